"""CLIP models of transformers and open_clip, from their folders, behind the interface of our own."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import OPEN_CLIP, read_component, read_json
from ldm.conditioning.clip import LatentCLIP, is_latent_clip, load_latent_clip
from ldm.conditioning.image_encoder import CLIP_MEAN, CLIP_STD, clip_pixels_of, load_image_encoder
from ldm.conditioning.load import build_text_encoder
from ldm.conditioning.network_settings import check_size
from ldm.conditioning.open_clip import is_open_clip, open_clip_package
from ldm.conditioning.prompts.weighted import Text
from ldm.conditioning.text import TextEncoder, WindowedEncoder
from ldm.conditioning.tokenizer import load_tokenizer
from ldm.diffusion.clip_guidance import by_estimate
from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.foreign import foreign
from ldm.models.autoencoder import AutoencoderKL

_VISION = ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio")


class PictureCLIP:
    """A CLIP that looks at clean pictures. It guides by the estimate of x0, decoded.

    vision: pixels (B, 3, size, size), resized and normalised, to features (B, D). mean, std: of the colours.
    logit_scale: what cosines are multiplied by to become logits. autoencoder: of the model that it guides; None where
    it is to score pictures only. interval: the noise levels in which it guides.
    """

    interval = (0.0, math.inf)

    def __init__(
        self,
        vision: Callable[[Tensor], Tensor],
        text: WindowedEncoder,
        size: int,
        logit_scale: float,
        autoencoder: AutoencoderKL | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ):
        self.vision, self.text, self.size, self.logit_scale = vision, text, size, logit_scale
        self.autoencoder, self.mean, self.std = autoencoder, mean, std

    def image_features(self, pictures: Tensor) -> Tensor:
        """Return (B, D), unnormalised and differentiable, of pictures (B, 3, H, W) in [0, 1]."""
        weight = next(self.text.module.parameters())
        pixels = clip_pixels_of(pictures.float(), self.size, self.mean, self.std)
        return self.vision(pixels.to(weight)).float()

    def text_features(self, prompts: Sequence[Text]) -> Tensor:
        """Return (B, D), unnormalised; of a prompt of more than one window by its first."""
        with torch.no_grad():
            pooled = self.text.encode(list(prompts))[0].pooled
        assert pooled is not None
        return pooled.float()

    def around(self, denoise: Denoise, texts: Tensor, scale: float | Tensor) -> Denoise:
        """Return the denoiser guided towards texts, by their features (B, D) or (1, D): see `by_estimate`.

        The gradient goes through this CLIP and the decoder, and not through the denoiser.
        """
        autoencoder, wanted = self.autoencoder, F.normalize(texts, dim=-1)
        if autoencoder is None:
            raise ValueError("this CLIP was loaded without the autoencoder of a model, and can't guide it")

        def log_likelihood(x0: Tensor) -> Tensor:
            weight = next(autoencoder.decoder.parameters())
            pictures = autoencoder.decode(autoencoder.unscale(x0).to(weight)).float() / 2 + 0.5
            if not pictures.requires_grad:
                raise UserError(
                    "the decoder gives no gradient here, by which this CLIP guides: load the model with backend torch"
                )
            seen = F.normalize(self.image_features(pictures), dim=-1)
            return self.logit_scale * (seen * wanted).sum(-1)

        return by_estimate(denoise, log_likelihood, scale, self.interval)


def load_clip(
    folder: str | Path,
    autoencoder: AutoencoderKL | None = None,
    text: TextEncoder | None = None,
    device: torch.device | str = "cpu",
) -> LatentCLIP | PictureCLIP:
    """Load a CLIP from a folder: our own, transformers' CLIPModel, or a checkpoint of open_clip; in float32.

    autoencoder, text: of the model that it guides or scores; our own can't do without, the others guide with the first.
    Raises UserError.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"{folder}: there is no such folder: give the folder of a CLIP")
    if (place / OPEN_CLIP).is_file() and not (place / "config.json").is_file():
        return _from_open_clip(place, autoencoder, device)
    config = read_json(place / "config.json")
    if is_latent_clip(config):
        if autoencoder is None or text is None:
            raise UserError(f"{folder} looks at a model's latents: give the model that it was trained for")
        return load_latent_clip(folder, autoencoder, text, device)
    return _from_transformers(place, autoencoder, device)


def _from_transformers(
    folder: Path, autoencoder: AutoencoderKL | None, device: torch.device | str
) -> PictureCLIP:
    config, tensors = read_component(folder, "")
    named, inside = config.get("architectures"), config.get("text_config")
    if (named or ["CLIPModel"]) != ["CLIPModel"] or not isinstance(inside, Mapping):
        raise UserError(
            f"{folder} holds a {named or 'config'!s:.60}: a CLIPModel of transformers, one of open_clip, or a clip "
            "folder that was trained here is needed"
        )
    encoder = load_image_encoder(folder, device=device)
    settings = {
        **inside,
        "projection_dim": config.get("projection_dim", inside.get("projection_dim", 512)),
        "architectures": ["CLIPTextModelWithProjection"],
    }
    own = {
        name: each for name, each in tensors.items() if name.startswith(("text_model.", "text_projection."))
    }
    text = build_text_encoder(settings, own, load_tokenizer(folder, "clip"), device=device, where=str(folder))
    scale = _scale_of(tensors, folder)

    def vision(pixels: Tensor) -> Tensor:
        return encoder.module(pixels).image_embeds

    return PictureCLIP(vision, text, encoder.size, scale, autoencoder)


def _from_open_clip(
    folder: Path, autoencoder: AutoencoderKL | None, device: torch.device | str
) -> PictureCLIP:
    config, tensors = read_component(folder, "")
    if not is_open_clip(config):
        raise UserError(f"{folder}/{OPEN_CLIP} has no text_cfg: it is no config of open_clip's CLIP")
    text = build_text_encoder(config, tensors, None, device=device, where=str(folder))
    tower, size = _open_clip_vision(config, tensors, str(folder))
    tower.to(device).eval().requires_grad_(False)
    shown = read_json(folder / OPEN_CLIP).get("preprocess_cfg", {})
    colours = [_colours(shown.get(name, usual), name, folder) for name, usual in _USUAL.items()]
    return PictureCLIP(tower, text, size, _scale_of(tensors, folder), autoencoder, *colours)


_USUAL = {"mean": CLIP_MEAN, "std": CLIP_STD}


def _colours(given: Any, name: str, folder: Path) -> tuple[float, ...]:
    if (
        not isinstance(given, list | tuple)
        or len(given) != 3
        or not all(isinstance(each, float | int) for each in given)
    ):
        raise UserError(
            f"{folder}/{OPEN_CLIP}: preprocess_cfg.{name} is {given!r:.60}, where three numbers are needed"
        )
    return tuple(map(float, given))


def _open_clip_vision(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> tuple[Any, int]:
    """The tower for pictures of an open_clip model, and the side that it sees. Raises UserError."""
    from accelerate import init_empty_weights

    models = open_clip_package(where).model

    vision = config.get("vision_cfg")
    if not isinstance(vision, Mapping) or not isinstance(vision.get("image_size", 224), int):
        raise UserError(f"{where}: vision_cfg must hold named entries, and image_size be one number")
    with foreign(f"{where}:", "open_clip refuses the config"):
        given, plain = dict(vision), vars(models.CLIPVisionCfg())
        odd = [key for key in given if key not in _VISION and (key not in plain or given[key] != plain[key])]
        if odd or not isinstance(given.get("layers", 12), int):
            name = (odd or ["layers"])[0]
            raise UserError(
                f"{where}: only CLIP's own vision transformers are supported, not {name} = {given[name]!r:.60}"
            )
        for key in ("image_size", "layers", "width", "patch_size", "head_width"):
            if key in given:
                check_size(key, given[key], len(tensors), where)
        with init_empty_weights(include_buffers=False):
            tower = models._build_vision_tower(config["embed_dim"], given, config.get("quick_gelu", False))
    own = {name.removeprefix("visual."): each for name, each in tensors.items() if name.startswith("visual.")}
    load_strict(tower, own, where)
    return tower, given.get("image_size", 224)


def _scale_of(tensors: Mapping[str, Tensor], folder: Path) -> float:
    found = tensors.get("logit_scale")
    if found is None or found.numel() != 1:
        raise UserError(f"{folder}: its weights hold no logit_scale: they are no whole CLIP")
    return float(found.float().exp())
