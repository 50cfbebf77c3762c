"""Adversarial terms of an autoencoder's loss (Esser et al. 2021): two players in one loss, under one optimizer.

Each player's term is blind to the other's weights, so the gradient of their sum is each one's own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ldm.models.discriminator import PatchDiscriminator
from ldm.training.distributed import mean_over_processes

Kind = Literal["hinge", "vanilla"]
_DELTA = 1e-6  # of Esser et al. 2021, eq. 7
_LARGEST = 1e4  # the adaptive weight's bound, as in their code


@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator of patches against the autoencoder.

    weight: of the generator's term, times the adaptive weight. loss: hinge (Lim & Ye 2017), or vanilla, the
        non-saturating one (Goodfellow et al. 2014).
    start: pictures seen before either player plays: until then reconstructions are too poor to learn from.
    n_layers, width: of the discriminator; 3 layers see patches of 70x70 pixels.
    """

    weight: float = 0.5
    loss: Kind = "hinge"
    start: int = 50_000
    n_layers: int = 3
    width: int = 64


@dataclass(frozen=True)
class Verdicts:
    """Logits (B, 1, h, w), high for real.

    real, fake: of the originals and the decodings; only the discriminator's weights get their gradient.
    decoded: of the decodings again; only what decoded them gets its gradient.
    """

    real: Tensor
    fake: Tensor
    decoded: Tensor


def judge(discriminator: PatchDiscriminator, originals: Tensor, decoded: Tensor) -> Verdicts:
    """Judge originals and decoded: (B, 3, H, W) in [-1, 1]."""
    real, fake = discriminator(torch.cat([originals, decoded.detach()])).chunk(2)
    frozen = {name: each.detach() for name, each in discriminator.named_parameters()}
    return Verdicts(real, fake, functional_call(discriminator, frozen, (decoded,)))


def adversarial_loss(
    config: AdversarialConfig, verdicts: Verdicts, reconstruction: Tensor, last_layer: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return both players' terms, summed, and scalars for the log.

    reconstruction: the rest of the decoder's loss, which the adaptive weight keeps the generator's term level with at
    `last_layer`, the decoder's last weight.
    """
    generator = generator_loss(config.loss, verdicts.decoded)
    discriminator = discriminator_loss(config.loss, verdicts.real, verdicts.fake)
    weight = adaptive_weight(reconstruction, generator, last_layer)
    logs = {"generator": generator, "discriminator": discriminator, "adaptive_weight": weight}
    return config.weight * weight * generator + discriminator, logs


def generator_loss(kind: Kind, decoded: Tensor) -> Tensor:
    """Return the loss that makes decodings seem real."""
    decoded = decoded.float()
    return -decoded.mean() if kind == "hinge" else F.softplus(-decoded).mean()


def discriminator_loss(kind: Kind, real: Tensor, fake: Tensor) -> Tensor:
    """Return the loss that tells decodings from originals; the mean of both halves."""
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, last_layer: Tensor) -> Tensor:
    """Return the ratio of the losses' gradients at the decoder's last layer, by their norms (Esser et al. 2021, eq. 7).

    Of the whole batch's gradients, however many processes share it; where it is taken in parts, of
    each part's own, which is a noisier ratio.
    """
    norms = [
        mean_over_processes(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
        for loss in (reconstruction, generator)
    ]
    return (norms[0] / (norms[1] + _DELTA)).clamp(max=_LARGEST)
