"""FID's Inception-v3: TensorFlow's graph of 2015-12-05, on which FID, KID and Inception Score are defined.

Szegedy et al. 2015 (arXiv:1512.00567), but for what this graph does otherwise: 1008 classes, averages of 3x3 that leave
the padding out, and in the last block a maximum in place of an average. Tensors have the names of `WEIGHTS`, the file
that pytorch-fid publishes; torch-fidelity's `weights-inception-2015-12-05-6726825d.pth` has the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
_BN_EPS = 1e-3


@dataclass(frozen=True)
class Conv:
    """A convolution by its name: kernel and padding are (height, width). Padded so that stride 1 keeps the size."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1

    @property
    def padding(self) -> tuple[int, int]:
        return (0, 0) if self.stride > 1 else (self.kernel[0] // 2, self.kernel[1] // 2)


# A branch of a block: convolutions one after the other. What stands side by side in an inner tuple is concatenated.
Branch = tuple[Conv | tuple[Conv, ...], ...]
_3, _5, _TALL, _WIDE = (3, 3), (5, 5), (7, 1), (1, 7)


def _a(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, _5)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, _3), Conv("branch3x3dbl_3", 96, _3)),
        (Conv("branch_pool", pooled),),
    )


def _c(inner: int) -> tuple[Branch, ...]:
    names = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    double = zip(names, (inner, inner, inner, inner, 192), ((1, 1), _TALL, _WIDE, _TALL, _WIDE), strict=True)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, _WIDE), Conv("branch7x7_3", 192, _TALL)),
        tuple(Conv(*each) for each in double),
        (Conv("branch_pool", 192),),
    )


def _fork(name: str) -> tuple[Conv, Conv]:
    return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))


_B: tuple[Branch, ...] = (
    (Conv("branch3x3", 384, _3, 2),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, _3), Conv("branch3x3dbl_3", 96, _3, 2)),
    (),
)
_D: tuple[Branch, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, _3, 2)),
    (
        *(Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, _WIDE)),
        *(Conv("branch7x7x3_3", 192, _TALL), Conv("branch7x7x3_4", 192, _3, 2)),
    ),
    (),
)
_E: tuple[Branch, ...] = (
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), _fork("branch3x3_2")),
    (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, _3), _fork("branch3x3dbl_3")),
    (Conv("branch_pool", 192),),
)
# The blocks in their order, with the way the last branch of each begins.
_BLOCKS = (
    *(("Mixed_5b", _a(32), "average"), ("Mixed_5c", _a(64), "average"), ("Mixed_5d", _a(64), "average")),
    ("Mixed_6a", _B, "halve"),
    *(("Mixed_6b", _c(128), "average"), ("Mixed_6c", _c(160), "average")),
    *(("Mixed_6d", _c(160), "average"), ("Mixed_6e", _c(192), "average")),
    *(("Mixed_7a", _D, "halve"), ("Mixed_7b", _E, "average"), ("Mixed_7c", _E, "maximum")),
)


class BatchNorm(nn.Module):
    """Batch normalisation by stored moments, as it is after training."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, mean, var, self.get_buffer("weight"), self.get_buffer("bias"), eps=_BN_EPS)


class ConvNormReLU(nn.Module):
    """A convolution without bias, its batch norm, and max(x, 0)."""

    def __init__(self, width: int, conv: Conv, padding: tuple[int, int] | None = None):
        super().__init__()
        where = conv.padding if padding is None else padding
        self.conv = nn.Conv2d(width, conv.out, conv.kernel, conv.stride, where, bias=False)
        self.bn = BatchNorm(conv.out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches over one input, their outputs concatenated along the channels; the last branch pools first."""

    def __init__(self, width: int, branches: tuple[Branch, ...], pool: str):
        super().__init__()
        self.branches, self.pool, self.out = branches, pool, 0
        for branch in branches:
            inner = width
            for step in branch:
                convs = step if isinstance(step, tuple) else (step,)
                for conv in convs:
                    self.add_module(conv.name, ConvNormReLU(inner, conv))
                inner = sum(conv.out for conv in convs)
            self.out += inner

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for branch in self.branches:
            h = self._pooled(x) if branch is self.branches[-1] else x
            for step in branch:
                convs = step if isinstance(step, tuple) else (step,)
                parts = [self.get_submodule(conv.name)(h) for conv in convs]
                h = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            outputs.append(h)
        return torch.cat(outputs, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "halve":
            return F.max_pool2d(x, 3, 2)
        if self.pool == "maximum":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # as TensorFlow averages


class InceptionV3(nn.Module):
    """FID's Inception-v3 of 23.9 M parameters, frozen. Its features are the last average ("pool3") of 2048 numbers."""

    size = 299  # of the pictures that it sees, in pixels along a side

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, Conv("", 32, _3, 2))
        self.Conv2d_2a_3x3 = ConvNormReLU(32, Conv("", 32, _3), padding=(0, 0))
        self.Conv2d_2b_3x3 = ConvNormReLU(32, Conv("", 64, _3))
        self.Conv2d_3b_1x1 = ConvNormReLU(64, Conv("", 80))
        self.Conv2d_4a_3x3 = ConvNormReLU(80, Conv("", 192, _3), padding=(0, 0))
        width = 192
        for name, branches, pool in _BLOCKS:
            block = Mixed(width, branches, pool)
            self.add_module(name, block)
            width = block.out
        self.fc = nn.Linear(width, 1008)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features (B, 2048) of pictures (B, 3, 299, 299) in [0, 255]; see `resize_like_tensorflow`."""
        x = (pictures - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)
        for name, _, _ in _BLOCKS:  # (B, 288, 35, 35), (B, 768, 17, 17), (B, 2048, 8, 8)
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor, bias: bool = True) -> Tensor:
        """Return the logits (B, 1008) of features (B, 2048). The Inception Score was defined without the bias."""
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


def without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors without the counters of training steps that newer batch norms keep."""
    return {name: each for name, each in tensors.items() if not name.endswith("num_batches_tracked")}


def resize_like_tensorflow(pictures: Tensor, size: int = InceptionV3.size) -> Tensor:
    """Resize pictures (B, 3, H, W) to (B, 3, size, size) by TensorFlow 1's bilinear: float32, in the range they had.

    Output pixel i lies at i * H / size of the input, not at the middles of pixels, and nothing is smoothed before a
    picture is made smaller. FID is defined with it, and other resizing gives other figures (Parmar et al. 2022).
    """
    x = _along(pictures.float(), -1, size)
    return _along(x, -2, size)


def _along(x: Tensor, dim: int, size: int) -> Tensor:
    own = x.shape[dim]
    place = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(own / size)
    low = place.long()
    shape = [1] * x.ndim
    shape[dim] = size
    share = (place - low).view(shape)
    before, after = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(own - 1))
    return before + (after - before) * share
