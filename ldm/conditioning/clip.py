"""CLIP over a model's latents: pictures and texts to features, and guidance by their likeness (GLIDE)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component
from ldm.conditioning.prompts.weighted import Text
from ldm.conditioning.text import TextEncoder
from ldm.diffusion.classifier_guidance import by_score
from ldm.diffusion.denoiser import Denoise
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import CLASS, CLIP, CLIPConfig

# From pure noise nothing can be read, and what a trained network makes of it would be multiplied by sigma^2.
INTERVAL = (0.0, 10.0)
_FEATURES = 8  # of a probe
_APART = 0.1  # how far, as a share, a probe may be from that of training: bfloat16 moves it by about 0.02


class LatentCLIP:
    """A `CLIP` with the frozen parts that it was trained over. It looks at latents, of any noise level.

    interval: the noise levels in which it guides.
    """

    interval = INTERVAL

    def __init__(self, network: CLIP, autoencoder: AutoencoderKL, text: TextEncoder):
        self.network, self.autoencoder, self.text = network, autoencoder, text

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by to become logits."""
        return float(self.network.scale.detach())

    def image_features(self, pictures: Tensor) -> Tensor:
        """Return (B, D), unnormalised, of pictures (B, 3, H, W) in [0, 1]: those of their clean latents.

        H, W: multiples of the autoencoder's factor.
        """
        weight = next(self.autoencoder.encoder.parameters())
        with torch.no_grad():
            posterior = self.autoencoder.encode((pictures * 2 - 1).to(weight))
            latents = self.autoencoder.scale(posterior.mean.float())
            return self.noised_features(latents, torch.zeros(len(latents), device=latents.device))

    def noised_features(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return (B, D), unnormalised and differentiable, of latents `x` = x0 + sigma * noise; sigma: (B,)."""
        weight = self.network.logit_scale
        return self.network.image_features(x.to(weight), sigma.to(weight)).float()

    def text_features(self, prompts: Sequence[Text]) -> Tensor:
        """Return (B, D), unnormalised."""
        with torch.no_grad():
            # Each at its own length: what stands beside a prompt has no say in its features.
            return torch.cat([self._of_text(prompt) for prompt in prompts])

    def _of_text(self, prompt: Text) -> Tensor:
        hidden = self.text.encode([prompt])[0].text
        return self.network.text_features(hidden.to(self.network.logit_scale)).float()

    def around(self, denoise: Denoise, texts: Tensor, scale: float | Tensor) -> Denoise:
        """Return the denoiser guided towards texts, by their features (B, D) or (1, D): see `by_score`.

        log p(text | x) is the logit, as in GLIDE: the cosine times `logit_scale`.
        """
        wanted = F.normalize(texts, dim=-1)

        def log_likelihood(x: Tensor, sigma: Tensor) -> Tensor:
            seen = F.normalize(self.noised_features(x, sigma), dim=-1)
            return self.logit_scale * (seen * wanted).sum(-1)

        return by_score(denoise, log_likelihood, scale, self.interval)


def load_latent_clip(
    folder: str | Path, autoencoder: AutoencoderKL, text: TextEncoder, device: torch.device | str = "cpu"
) -> LatentCLIP:
    """Load an exported `clip` folder over a model's parts, in float32. Raises UserError where they are not its own."""
    settings, tensors = read_component(folder, "")
    config = CLIPConfig.read(settings, f"{folder}/config.json")
    _check_parts(config, autoencoder, text, folder)
    with torch.device("meta"):
        network = CLIP(config)
    load_strict(network, tensors, folder)
    return LatentCLIP(network.float().to(device).eval().requires_grad_(False), autoencoder, text)


def is_latent_clip(config: dict[str, Any]) -> bool:
    """Return whether a config.json is that of a `CLIP` over latents."""
    return config.get("architectures") == [CLASS]


def _check_parts(
    config: CLIPConfig, autoencoder: AutoencoderKL, text: TextEncoder, folder: str | Path
) -> None:
    channels = autoencoder.config.latent_channels
    if channels != config.in_channels:
        raise UserError(
            f"{folder} looks at latents of {config.in_channels} channels, and this model's have {channels}: train one "
            "for it with configs/lectures/clip.yaml"
        )
    width = text.encode([""])[0].text.shape[-1]
    if width != config.text_hidden_size:
        raise UserError(
            f"{folder} reads texts by {config.text_hidden_size} features, and this model's text encoder gives {width}: "
            "train one for it with configs/lectures/clip.yaml"
        )
    probes = (
        ("autoencoder", config.autoencoder, autoencoder_probe(autoencoder)),
        ("text encoder", config.text_encoder, text_probe(text)),
    )
    for name, wanted, found in probes:
        expected, given = torch.tensor(wanted), torch.tensor(found)
        if len(wanted) != len(found) or not (given - expected).norm() <= _APART * expected.norm():
            raise UserError(
                f"{folder} was trained over another {name} than this model's: take the model that it was trained for, "
                "or train one for this with configs/lectures/clip.yaml"
            )


@torch.no_grad()
def autoencoder_probe(autoencoder: AutoencoderKL) -> tuple[float, ...]:
    """Return by what an autoencoder's latents are known again: the means (C,) of those of a square of grey to white."""
    weight, side = next(autoencoder.encoder.parameters()), 4 * autoencoder.config.factor
    ramp = torch.linspace(0, 1, side).expand(1, 3, side, side)
    latents = autoencoder.scale(autoencoder.encode(ramp.to(weight)).mean.float())
    return tuple(round(each, 4) for each in latents.mean((0, 2, 3)).tolist())


@torch.no_grad()
def text_probe(text: TextEncoder) -> tuple[float, ...]:
    """Return by what a text encoder is known again: the first of the features that it gives "" at its first token."""
    first = text.encode([""])[0].text[0, 0, :_FEATURES]
    return tuple(round(each, 4) for each in first.float().tolist())
