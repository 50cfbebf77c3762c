"""What the training of a first stage runs in one call: an autoencoder of either kind and its adversary."""

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import read_component
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.vq import Quantized, VQConfig, VQModel
from ldm.training.adversarial import Verdicts, judge

Quantizer = Literal["kl", "vq", "none"]
_LEAST_LOGVAR = -30.0  # where AutoencoderKL's log-variance is cut: a standard deviation of 3e-7


@dataclass(frozen=True)
class Reconstruction:
    """The parts that a loss is made of.

    decoded: (B, 3, H, W). latent: the posterior, or the codes.
    verdicts: the discriminator's; None where it was not asked.
    idle: zero. It ties a discriminator that was not asked to the loss, so that its gradients are there, and zero:
        processes wait for each other's, and optimizers and checkpoints hold the same weights from the first step on.
        An optimizer's weight decay still acts on it; before GroupNorm the scale of a weight makes no difference.
    """

    decoded: Tensor
    latent: DiagonalGaussian | Quantized
    verdicts: Verdicts | None
    idle: Tensor | float


class FirstStage(nn.Module):
    """An autoencoder and, where there is one, the discriminator of its decodings."""

    def __init__(self, autoencoder: AutoencoderKL | VQModel, discriminator: PatchDiscriminator | None = None):
        super().__init__()
        self.autoencoder = autoencoder
        self.discriminator = discriminator

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
        judged: bool = False,
    ) -> Reconstruction:
        """Run all that is trained once.

        source, target: (B, 3, H, W) in [-1, 1], what is encoded and what its decoding should be. noise: see
        AutoencoderKL. labels: (B,). judged: ask the discriminator.
        """
        decoded, latent = self._run(source, noise, labels)
        if self.discriminator is None:
            return Reconstruction(decoded, latent, None, 0.0)
        if judged:
            return Reconstruction(decoded, latent, judge(self.discriminator, target, decoded), 0.0)
        idle = torch.stack([each.sum() for each in self.discriminator.parameters()]).sum() * 0.0
        return Reconstruction(decoded, latent, None, idle)

    def reconstruct(
        self, picture: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, DiagonalGaussian | Quantized]:
        """Return a picture's decoding, without chance, and its latent."""
        return self._run(picture, None, labels)

    def encode(self, picture: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return latents as a second stage is taught them: the posterior's mean, or what is not yet quantised."""
        encoded = self.autoencoder.encode(picture, labels)
        return encoded.mean if isinstance(encoded, DiagonalGaussian) else encoded

    def _run(
        self, source: Tensor, noise: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, DiagonalGaussian | Quantized]:
        if isinstance(self.autoencoder, VQModel):
            return self.autoencoder(source, labels)
        return self.autoencoder(source, noise, labels)


def component(quantizer: Quantizer) -> str:
    """Return the name of the autoencoder's folder, as diffusers' pipelines have it."""
    return "vqvae" if quantizer == "vq" else "vae"


def build_autoencoder(
    quantizer: Quantizer,
    settings: AutoencoderConfig | VQConfig | None,
    init: str | None,
    classes: int | None,
) -> AutoencoderKL | VQModel:
    """Build an autoencoder from nothing, or by the settings and weights in `init`, conditioned on `classes`.

    Raises UserError.
    """
    config_class = VQConfig if quantizer == "vq" else AutoencoderConfig
    where, tensors = f"{init}/{component(quantizer)}", None
    if init:
        found, tensors = read_component(init, component(quantizer))
        settings = config_class.from_diffusers(found, f"{where}/config.json")
    settings = settings or config_class()
    if (init or settings.num_class_embeds) and settings.num_class_embeds != classes:
        raise UserError(
            f"the autoencoder is conditioned on {settings.num_class_embeds or 'no'} labels (num_class_embeds), but "
            f"autoencoder.labels makes {classes or 'none'} of the pictures"
        )
    settings = replace(settings, num_class_embeds=classes)
    network = VQModel(settings) if isinstance(settings, VQConfig) else AutoencoderKL(settings)
    if tensors is not None:  # in float32 and as copies: training must not write into the mapped file
        load_strict(network, {k: v.float().clone() for k, v in tensors.items()}, where)
    return network


def freeze_encoder(network: AutoencoderKL | VQModel) -> None:
    """Leave only the decoder to be trained: latents stay what they are."""
    network.requires_grad_(False)
    network.decoder.requires_grad_(True)
    if hasattr(network, "post_quant_conv"):
        network.post_quant_conv.requires_grad_(True)


def scaled(network: AutoencoderKL | VQModel, latents: Tensor, certain: bool) -> AutoencoderKL | VQModel:
    """Return a copy whose latents a second stage can take as they are, or by the config's scaling_factor.

    latents: (N, C, h, w), what it encodes pictures to. With a codebook, they get unit variance by the scaling_factor;
    without, zero mean and unit variance a channel by themselves. certain: nobody trained its variance.
    """
    network = copy.deepcopy(network)
    if isinstance(network, VQModel):
        network.config = replace(network.config, scaling_factor=1 / latents.std().item())
        return network
    normalise(network, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    if certain:
        make_certain(network)
    network.config = replace(
        network.config, scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None
    )
    return network


@torch.no_grad()
def normalise(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold (z - mean) / std into `quant_conv` and its inverse into `post_quant_conv`; both are 1x1 convolutions.

    mean, std: (latent_channels,). Afterwards the config's scaling_factor should be 1. Rounded once, at the end.
    """
    before, after = model.quant_conv, model.post_quant_conv
    assert before.bias is not None and after.bias is not None
    channels, mean, std = len(mean), mean.double().cpu(), std.double().cpu()
    weight, bias = before.weight.double().cpu(), before.bias.double().cpu()
    weight[:channels] /= std.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2 * std.log()
    before.weight.copy_(weight)
    before.bias.copy_(bias)
    weight = after.weight.double().cpu()
    after.bias.copy_(after.bias.double().cpu() + weight[:, :, 0, 0] @ mean)
    after.weight.copy_(weight * std.view(1, -1, 1, 1))


@torch.no_grad()
def make_certain(model: AutoencoderKL) -> None:
    """Give a plain autoencoder, whose variance nobody trained, the least one: a drawn latent is then the mean."""
    channels = model.config.latent_channels
    assert model.quant_conv.bias is not None
    model.quant_conv.weight[channels:] = 0
    model.quant_conv.bias[channels:] = _LEAST_LOGVAR
