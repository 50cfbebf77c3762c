"""Pictures as prompts: an IP-Adapter with its image encoder, and what one request is told by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.ip_adapter import read_ip_adapter, write_ip_adapter
from ldm.conditioning.image_encoder import ImageEncoder, load_image_encoder
from ldm.errors import UserError
from ldm.models.denoising import DenoisingNetwork
from ldm.models.ip_adapter import HEAD, IPAdapter, IPAdapterConfig, check_fit, cross_attentions

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class ImagePrompt:
    """One adapter's part of what B pictures are told.

    positive: of n pictures, which are attended to together, (R, n, P), or (R, n, L, C), as `ImageAdapter.features`
    gives them; R is 1 for all rows, or B. negative: the same without the pictures. scale: how much of them, one number,
    or one a row; 0 is nothing.
    """

    adapter: IPAdapter
    positive: Tensor
    negative: Tensor
    scale: float | Sequence[float] = 1.0


@dataclass
class ImageAdapter:
    """An IP-Adapter over a network, and the encoder that looks at the pictures for it; encoders may be shared."""

    network: IPAdapter
    encoder: ImageEncoder

    def prompt(
        self, pictures: "Sequence[Sequence[Image | np.ndarray]]", scale: float | Sequence[float] = 1.0
    ) -> ImagePrompt:
        """Return what to give `ldm.sampling.prepare`.

        pictures: one list of n pictures for all rows, or one list each, of PIL's or uint8 (H, W, 3). Raises UserError.
        """
        return ImagePrompt(self.network, *self.features(pictures), scale)

    def features(self, pictures: "Sequence[Sequence[Image | np.ndarray]]") -> tuple[Tensor, Tensor]:
        """Return the encoder's features of R rows of n pictures, and those of no picture.

        These are, as in diffusers, zeros for a "base" adapter, else what the encoder sees in a picture of zeros.
        """
        rows = [list(row) for row in pictures]
        counts = {len(row) for row in rows}
        if len(counts) != 1 or 0 in counts:
            raise UserError("give an image prompt at least one picture, and each row as many as the others")
        shape = (len(rows), counts.pop())
        pixels = self.encoder.pixels([each for row in rows for each in row])
        if self.network.config.kind == "base":
            found = self.encoder.embeds(pixels)
            nothing = torch.zeros_like(found)
        else:
            found = self.encoder.states(pixels)
            nothing = self.encoder.states(torch.zeros_like(pixels[:1])).expand_as(found)
        return found.unflatten(0, shape), nothing.unflatten(0, shape)


def load_ip_adapter(
    network: DenoisingNetwork,
    path: str | Path,
    image_encoder: ImageEncoder | str | Path | None = None,
) -> ImageAdapter:
    """Load an IP-Adapter (base, Plus, full face) over a network, on its device and in its precision, and attach it.

    path: of a file, safetensors or a pickle. image_encoder: loaded, or its folder; None is the folder `image_encoder`
    beside the file, as it is published. To take it out again: `adapter.network.detach()`. Raises UserError, of other
    files and families too.
    """
    paths = list(cross_attentions(network))
    settings, tensors = read_ip_adapter(path, paths)
    config = IPAdapterConfig(**settings)
    check_fit(network, config, path)
    if config.inner % HEAD:
        raise UserError(
            f"{path}: its resampler is {config.inner} wide, which is no whole number of heads of {HEAD}"
        )
    if not isinstance(image_encoder, ImageEncoder):
        folder = Path(path).parent / "image_encoder" if image_encoder is None else Path(image_encoder)
        if image_encoder is None and not folder.is_dir():
            raise UserError(f"{path} has no folder image_encoder beside it: give the image encoder's folder")
        image_encoder = load_image_encoder(folder, network.dtype, network.device)
    _check_encoder(config, image_encoder, path)
    with torch.device("meta"):
        adapter = IPAdapter(network, config)
    try:
        load_strict(adapter, tensors, path)
        adapter.to(device=network.device, dtype=network.dtype).eval().requires_grad_(False)
    except BaseException:
        adapter.detach()
        raise
    return ImageAdapter(adapter, image_encoder)


def save_ip_adapter(adapter: IPAdapter, network: DenoisingNetwork, path: str | Path) -> None:
    """Write the adapter of a network as one `.safetensors` in the published layout. Raises UserError."""
    config = {"kind": adapter.config.kind, "depth": adapter.config.depth}
    write_ip_adapter(path, config, adapter.state_dict(), list(cross_attentions(network)))


def _check_encoder(config: IPAdapterConfig, encoder: ImageEncoder, path: str | Path) -> None:
    given = encoder.config.projection_dim if config.kind == "base" else encoder.config.hidden_size
    if given != config.features:
        raise UserError(
            f"{path} was made for an image encoder of {config.features} features, and this one gives {given}: take the "
            "encoder that is published with it (ViT-H has 1024 and 1280, ViT-bigG 1280 and 1664)"
        )


def image_parts(
    prompts: Sequence[ImagePrompt], network: DenoisingNetwork, rows: int, guides: bool
) -> Mapping[str, Tensor]:
    """Return the images of a Condition of B `rows`, or where guided 2B, the first B without the pictures.

    What has no scale for any row is left out: the network then computes what it does without. Raises UserError for an
    adapter of another network, or other numbers of rows.
    """
    parts: dict[str, Tensor] = {}
    for each in prompts:
        adapter = each.adapter
        if not adapter.is_attached_to(network):
            raise UserError(
                "an image prompt's IP-Adapter is not attached to the network that draws: load it again"
            )
        if f"{adapter.key}.tokens" in parts:
            raise UserError("an IP-Adapter is given two image prompts: give all its pictures in one")
        scale = torch.as_tensor(each.scale, dtype=torch.float32).reshape(-1)
        if len(scale) not in (1, rows) or not bool(scale.isfinite().all()):
            raise UserError(
                f"an image prompt's scale is {each.scale!r:.60}: give a finite number, or one a picture"
            )
        if len(each.positive) not in (1, rows) or each.positive.shape != each.negative.shape:
            raise UserError(
                f"an image prompt has pictures for {len(each.positive)} rows, where {rows} are drawn: give one list, "
                "or one a row"
            )
        if not bool((scale != 0).any()):
            continue
        with torch.no_grad():
            halves = [each.negative, each.positive] if guides else [each.positive]
            tokens = [adapter.tokens(half).expand(rows, -1, -1) for half in halves]
        parts[f"{adapter.key}.tokens"] = torch.cat(tokens)
        parts[f"{adapter.key}.scale"] = scale.expand(rows).repeat(len(halves))
    return parts
