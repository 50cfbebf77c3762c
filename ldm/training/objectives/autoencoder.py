"""The first stage: an autoencoder, with KL regularisation, a codebook or neither."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import read_text, write_text
from ldm.checkpoints.folder import write_component
from ldm.data.packages import PACKAGES_FOLDER
from ldm.errors import UserError
from ldm.foreign import parse_json
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.vq import Quantized, VQConfig, codebook_use
from ldm.training.adversarial import AdversarialConfig, adversarial_loss
from ldm.training.bounds import refuse_outside
from ldm.training.data.examples import Batch
from ldm.training.data.kinds import Data
from ldm.training.distributed import BatchGenerator, mean_over_processes
from ldm.training.first_stage import (
    FirstStage,
    Quantizer,
    Reconstruction,
    build_autoencoder,
    component,
    freeze_encoder,
    scaled,
)
from ldm.training.reconstruction import (
    Pixel,
    check_sides,
    perceptual_distance,
    psnr,
    reconstruction_loss,
    whole_pictures,
    write_pairs,
)

_STATISTICS = 2048  # pictures over which an export's latents are normalised
_LABELS = "labels.json"  # the classes' names, beside the network that knows them


@dataclass(frozen=True)
class Config:
    """Loss weights (Rombach et al. 2022, app. G) and data.

    quantizer: what keeps the latents in order: "kl", "vq" (a codebook) or "none" (a plain autoencoder).
    model, vq_model: the network's settings, without or with a codebook; None takes those of `init`, and Stable
        Diffusion's, or VQ-f8's, where there is none.
    init: a folder that holds the `vae`, or `vqvae`, to start from; None starts from nothing.
    data: what it learns from, of a kind: `pictures` from disk, of which the last `validation_pictures`, but a tenth at
        the most, are kept for validation, or one's own.
    train: "decoder" keeps the encoder as it is, so that the latents, and a U-Net trained on them, stay valid.
    crop: training sees square crops of this many pixels (the network is convolutional), at random; None for whole
        pictures: those of the data; of pictures from disk squares of data.resolution, cut as data.crop says.
    noise: standard deviation of what is added to the pictures before encoding, on their scale of [-1, 1]; the target
        stays clean (Vincent et al. 2008). Validation is of clean pictures.
    perceptual: weight of the distance in EfficientNet-Lite0's features, whose package is fetched; with 0 it is only
        measured in validation, and left out where they can't be had. kl: weight of the KL divergence a latent
        element. commitment: beta of van den Oord et al. 2017. A decoder alone is trained without the last two.
    adversarial: None trains without a discriminator.
    """

    renamed: ClassVar[dict[str, str]] = {
        "recipe": "data.mixture, with data.kind",
        "labels": "data.labels, with data.kind",
        "pictures": "data, with kind: pictures",
    }

    data: Data
    quantizer: Quantizer = "kl"
    model: AutoencoderConfig | None = None
    vq_model: VQConfig | None = None
    init: str | None = None
    train: Literal["all", "decoder"] = "all"
    packages: str = str(PACKAGES_FOLDER)
    crop: int | None = 64
    noise: float = 0.0
    pixel: Pixel = "l1"
    perceptual: float = 0.1
    kl: float = 1e-3
    commitment: float = 0.25
    adversarial: AdversarialConfig | None = None
    validation_pictures: int = 256

    def check(self) -> None:
        """Raises UserError for settings that contradict each other."""
        refuse_outside("autoencoder", self, ("validation_pictures", "crop"), 1)
        refuse_outside("autoencoder", self, ("noise", "perceptual", "kl", "commitment"), 0)
        other, mine = ("model", "vq_model") if self.quantizer == "vq" else ("vq_model", "model")
        if getattr(self, other):
            raise UserError(
                f"autoencoder.quantizer {self.quantizer} has its settings in autoencoder.{mine}, not {other}"
            )
        if self.init and getattr(self, mine):
            raise UserError(
                f"give autoencoder.{mine} or autoencoder.init, not both: init brings its own settings"
            )
        if self.train == "decoder" and not self.init:
            raise UserError(
                "training the decoder alone needs autoencoder.init: a folder that holds the autoencoder"
            )
        self.data.check("autoencoder.data")


class Objective:
    """Pixels + perceptual + KL or codebook + adversary; of a decoder alone, without KL and codebook."""

    def __init__(self, config: Config):
        config.check()
        self.config = config
        self.examples = config.data.examples("autoencoder.data", config.crop, config.validation_pictures)
        self.labels = self.examples.labels
        _check_init(config)
        _check_labels(config, self.labels)
        settings = config.vq_model if config.quantizer == "vq" else config.model
        network = build_autoencoder(config.quantizer, settings, config.init, len(self.labels) or None)
        self.factor, self.channels = network.config.factor, network.config.latent_channels
        check_sides("autoencoder", config.data, config.crop, self.examples.side, self.factor)
        if config.train == "decoder":
            freeze_encoder(network)
        elif isinstance(network, AutoencoderKL) and not (
            network.config.use_quant_conv and network.config.use_post_quant_conv
        ):
            raise UserError(
                "training an autoencoder needs use_quant_conv and use_post_quant_conv: the export folds the "
                "latents' normalisation into them"
            )
        self.stage = FirstStage(network, _discriminator(config, config.crop or self.examples.side))
        self.model: nn.Module = self.stage
        self.watched = config.pixel  # the whole rises when the adversary begins
        self.distance, self._without = perceptual_distance(config.packages, config.perceptual, "autoencoder")

    def prepare(self, device: torch.device, batch_size: int) -> None:
        if self.distance:
            self.distance.to(device)

    def helpers(self) -> Mapping[str, nn.Module]:
        """Return the frozen network beside `model`, if there is one."""
        return {"perceptual": self.distance} if self.distance else {}

    def batch(self, start: int, size: int, rows: slice) -> Batch:
        """Return crops of `crop` pixels a side."""
        return self.examples.cuts(start, size, rows)

    def loss(self, model: nn.Module, batch: Batch, rng: BatchGenerator) -> tuple[Tensor, dict[str, Tensor]]:
        config, adversary = self.config, self.config.adversarial
        device = next(model.parameters()).device
        batch = batch.to(device)
        source, noise = batch.pictures, None
        if config.quantizer == "kl":
            noise = rng.normal(self.channels, *(side // self.factor for side in source.shape[2:])).to(device)
        if config.noise:
            source = source + config.noise * rng.normal(*source.shape[1:]).to(device)
        judged = adversary is not None and batch.start >= adversary.start
        made: Reconstruction = model(source, batch.pictures, noise, batch.labels, judged)
        how = (config.pixel, config.perceptual, self.distance)
        reconstruction, logs = reconstruction_loss(made.decoded.float(), batch.pictures, *how)
        order, more = self._regularisation(made.latent)
        total, logs = reconstruction + order + made.idle, logs | more
        if adversary is None:
            return total, logs
        if made.verdicts is None:
            waiting = torch.zeros((), device=device)
            return total, {**logs, "generator": waiting, "discriminator": waiting, "adaptive_weight": waiting}
        last_layer = self.stage.autoencoder.decoder.conv_out.weight
        term, more = adversarial_loss(adversary, made.verdicts, reconstruction, last_layer)
        return total + term, logs | more

    def _regularisation(
        self, latent: DiagonalGaussian | Quantized
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What keeps latents in order: nothing where they are not trained.

        The codebook's use is of the whole batch; where that is taken in parts, the mean of the parts' own.
        """
        whole = self.config.train == "all"
        if isinstance(latent, Quantized):
            logs = codebook_use(mean_over_processes(self._counts(latent)))
            if not whole:
                return 0.0, logs
            term = latent.codebook + self.config.commitment * latent.commitment
            return term, {"codebook": latent.codebook, "commitment": latent.commitment, **logs}
        if self.config.quantizer == "none" or not whole:
            return 0.0, {}
        kl = latent.kl().float().mean() / latent.mean[0].numel()
        return self.config.kl * kl, {"kl": kl}

    def _counts(self, quantized: Quantized) -> Tensor:
        """How often each code was chosen: (K,)."""
        config = self.stage.autoencoder.config
        assert isinstance(config, VQConfig)
        return torch.bincount(quantized.indices.flatten(), minlength=config.num_vq_embeddings).float()

    @torch.no_grad()
    def validate(self, model: nn.Module, folder: Path, seen: int) -> dict[str, float]:
        """Return the PSNR of pictures never trained on (dB, of their full range); write originals over decodings."""
        assert isinstance(model, FirstStage)
        ratios: list[float] = []
        distances: list[float] = []
        counts: list[Tensor] = []
        for batch in self._whole(model, self.examples.held_out):
            originals = batch.pictures
            decoded, latent = model.reconstruct(originals, batch.labels)
            decoded = decoded.clamp(-1, 1)
            if not ratios:
                write_pairs(folder / f"decoded-{seen:08d}.png", originals, decoded)
            ratios += psnr(decoded, originals)
            if self.distance:
                distances += self.distance(decoded, originals).tolist()
            if isinstance(latent, Quantized):
                counts.append(self._counts(latent))
        use = codebook_use(torch.stack(counts).sum(0)) if counts else {}
        figures = {"psnr": sum(ratios) / len(ratios)}
        if distances:
            figures["perceptual_distance"] = sum(distances) / len(distances)
        return figures | {name: each.item() for name, each in use.items()}

    def _whole(self, model: nn.Module, count: int) -> Iterator[Batch]:
        return whole_pictures(self.examples, count, next(model.parameters()).device)

    def notes(self) -> list[str]:
        return [*self.examples.notes(), *self._without]

    @torch.no_grad()
    def export(self, model: nn.Module, folder: Path, config: str = "") -> None:
        """Write a diffusers folder, `vae` or `vqvae`; beside it the labels' names, where it is conditioned on them.

        A `vae` gets latents of zero mean and unit variance a channel, a `vqvae` the scaling_factor that makes the
        variance one. Where the decoder alone was trained, the latents stay as they were.
        """
        assert isinstance(model, FirstStage)
        network = model.autoencoder
        if self.config.train == "all":
            some = self._whole(model, min(_STATISTICS, self.examples.count))
            latents = torch.cat([model.encode(x.pictures, x.labels).double().cpu() for x in some])
            network = scaled(network, latents, certain=self.config.quantizer == "none")
        part = component(self.config.quantizer)
        write_component(folder, part, network.config.to_diffusers(), network.state_dict())
        if self.labels:
            write_text(folder / part / _LABELS, json.dumps(self.labels) + "\n")


def _check_init(config: Config) -> None:
    """Raise UserError where the folder to start from is not there."""
    if config.init and not Path(config.init).is_dir():
        raise UserError(
            f"autoencoder.init: there is no folder {config.init}: train a first stage with scripts/train.py and "
            "give its export"
        )


def _check_labels(config: Config, names: list[str]) -> None:
    """Raise UserError where `init` was trained with other labels."""
    if not (names and config.init):
        return
    path = Path(config.init) / component(config.quantizer) / _LABELS
    if parse_json(read_text(path), path) != names:
        raise UserError(f"{path} has other labels, or in another order, than autoencoder.data: change those")


def _discriminator(config: Config, side: int) -> PatchDiscriminator | None:
    if config.adversarial is None:
        return None
    discriminator = PatchDiscriminator(width=config.adversarial.width, n_layers=config.adversarial.n_layers)
    if side < discriminator.least_side:
        raise UserError(
            f"a discriminator of {config.adversarial.n_layers} layers needs pictures of "
            f"{discriminator.least_side} pixels a side, not {side}: lower autoencoder.adversarial.n_layers or "
            "raise autoencoder.crop"
        )
    return discriminator
