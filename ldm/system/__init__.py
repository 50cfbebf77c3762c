"""A whole text-to-image system: text encoder, denoising network, autoencoder and scheduler, from and to disk."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import ldm
from ldm.checkpoints import read_checkpoint
from ldm.checkpoints.checkpoint import Checkpoint
from ldm.checkpoints.files import load_strict
from ldm.checkpoints.folder import MODEL_INDEX, PREVIEW, read_component, write_component, write_folder
from ldm.checkpoints.hub import resolve
from ldm.checkpoints.single_file import write_single_file
from ldm.condition import AESTHETIC_SCORES, Condition
from ldm.conditioning.bound import BoundNetwork
from ldm.conditioning.control import Controls
from ldm.conditioning.load import export, write_tokenizers
from ldm.conditioning.system import build_conditioning
from ldm.conditioning.text import TextEncoder
from ldm.diffusion.scheduler_config import SchedulerConfig
from ldm.errors import UserError
from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.models.denoising import DenoisingNetwork
from ldm.models.diffusers_config import check_layers
from ldm.models.feature_reuse import FeatureReuse
from ldm.models.networks import NETWORKS
from ldm.models.quantization import Quantization, quantize
from ldm.system.few_steps import FILE as FEW_STEPS
from ldm.system.few_steps import FewSteps, fast_form, read_few_steps

# Whose scheduler diffusers changes where a folder is loaded, whatever the folder says.
_INSISTENT = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
M = TypeVar("M", bound=nn.Module)


def bundled(pattern: str) -> Path | None:
    """Return the first file of such a name in this package: in a checkout's `weights/`, or inside a wheel."""
    package = Path(ldm.__file__).parent
    found = (sorted((folder / "weights").glob(pattern)) for folder in (package, package.parent))
    return next((files[0] for files in found if files), None)


def bundled_model() -> Path:
    """Return the folder of the model that ships with this package. Raises UserError where it is not there."""
    index = bundled("*/model_index.json")
    if index is None:
        raise UserError("the bundled model is not there: name a model (a folder, a single file or a hub id)")
    return index.parent


@dataclass
class System:
    """The parts of a text-to-image system, frozen and in evaluation mode.

    Attributes:
        network: what denoises: a U-Net, or another one of `ldm.models.networks`.
        pipeline: diffusers' pipeline class, as model_index.json names it.
        options: the entries of model_index.json that are no components.
        fingerprint: of all weights as they lie on disk and of the scheduler; it changes with any training.
        notes: what the reader of the files should be told.
        precision: of each part's weights as they lie on disk, where all of a part's have one.
        quantization: of the network's weights, see `quantize`.
        preview: the folder of a tiny autoencoder (AutoencoderTiny) of the same latents, if there is one. It is not read
            before it is used, and it goes along where the system is saved.
    """

    network: DenoisingNetwork
    autoencoder: AutoencoderKL
    text: TextEncoder
    scheduler: SchedulerConfig
    pipeline: str = "StableDiffusionPipeline"
    options: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    notes: list[str] = field(default_factory=list)
    precision: dict[str, torch.dtype] = field(default_factory=dict)
    quantization: Quantization | None = None
    preview: Path | None = None

    @classmethod
    def load(
        cls,
        name: str | Path | None = None,
        *,
        torch_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        prediction_type: str | None = None,
        fast: bool = False,
    ) -> "System":
        """Load a diffusers folder, a single file or a hub id; None is the bundled model.

        variant: "fp16" reads the files of that name. prediction_type: what a single file's U-Net predicts, where
        the file does not say. fast: its few-step form, whose base it is then, see `few_steps`. The parts are built
        without memory of their own and take the file's mapped tensors.
        Raises UserError that says what is wrong and what to do.
        """
        path = bundled_model() if name is None else resolve(name, variant)
        if few_steps := read_few_steps(fast_form(path) if fast else path):
            _check_options(few_steps.options, few_steps.folder / FEW_STEPS)
            base = path if fast else few_steps.model(variant)
            how: dict[str, Any] = {"variant": variant, "prediction_type": prediction_type}
            return cls.load(base, **how)._in_few_steps(few_steps).to(device, torch_dtype)
        checkpoint = read_checkpoint(path, variant, prediction_type)
        kind = _network_of(checkpoint, path)
        for part in (kind.component, "vae", "scheduler"):
            if part not in checkpoint.configs or (part != "scheduler" and part not in checkpoint.tensors):
                raise UserError(f"{path} has no {part} in its model_index.json")
        scheduler = SchedulerConfig.from_dict(checkpoint.configs["scheduler"], f"{path}: scheduler")
        if checkpoint.pipeline in _INSISTENT:
            scheduler = scheduler.with_values(steps_offset=1, clip_sample=False)
        _check_options(checkpoint.options, path / MODEL_INDEX)
        try:
            scheduler.noise_schedule()  # a schedule that cannot be is refused now, not at the first picture
        except UserError as error:
            raise UserError(f"{path}: scheduler: {error}") from error
        config = kind.read_config(checkpoint.configs[kind.component], f"{path}: {kind.component}")
        network = filled(kind, config, checkpoint, kind.component, path)
        vae_config = AutoencoderConfig.from_diffusers(checkpoint.configs["vae"], f"{path}: vae")
        autoencoder = filled(AutoencoderKL, vae_config, checkpoint, "vae", path)
        system = cls(
            network=network,
            autoencoder=autoencoder,
            text=build_conditioning(checkpoint, path if path.is_dir() else None, torch_dtype, device),
            scheduler=scheduler,
            pipeline=checkpoint.pipeline,
            options=checkpoint.options,
            fingerprint=_identity(checkpoint, scheduler),
            notes=checkpoint.notes,
            precision=_precisions(checkpoint.tensors),
            preview=path / PREVIEW if (path / PREVIEW).is_dir() else None,
        )
        system.check(path)
        return system.to(device, torch_dtype)

    def _in_few_steps(self, form: FewSteps) -> "System":
        """Return the student that a few-step form makes of this model."""
        notes = form.merge(self.network, self.text.modules)
        found = fingerprint(self.network.state_dict())
        digest = f"{self.fingerprint} {found} {json.dumps(form.scheduler.to_dict(), sort_keys=True)}"
        return replace(
            self,
            scheduler=form.scheduler,
            options={**self.options, **form.options},
            notes=[*self.notes, *notes],
            fingerprint=hashlib.sha256(digest.encode()).hexdigest()[:10],
        )

    def check(self, path: str | Path) -> None:
        """Raise UserError where the parts do not belong together."""
        if self.autoencoder.config.num_class_embeds:
            raise UserError(
                f"{path}: the autoencoder is conditioned on labels, which text to image has none of"
            )
        channels, out = self.autoencoder.config.latent_channels, self.network.config.out_channels
        if out not in (channels, 2 * channels):  # twice: with a learned variance
            raise UserError(
                f"{path}: the {self.network.component} gives {out} channels, the autoencoder's latents have "
                f"{channels}: parts of different models"
            )
        sample, wants = self.text.encode([""])[0].parts(), self.wants
        for name, what in (("hidden", "the text"), ("pooled", "a pooled text")):
            given = sample[name].shape[-1] if name in sample else "none"
            if name in wants and given != wants[name]:
                or_else = ", or requires_aesthetics_score is wrong in model_index.json" if self.is_xl else ""
                raise UserError(
                    f"{path}: the {self.network.component} wants {wants[name]} features of {what}, the text encoder "
                    f"gives {given}: parts of different families{or_else}"
                )

    @property
    def wants(self) -> dict[str, int]:
        """The parts of a condition that the network wants, and of how many features each is."""
        wants = self.network.wants_scored if self.requires_aesthetics_score else self.network.wants
        return wants(self.autoencoder.config.latent_channels)

    @property
    def is_xl(self) -> bool:
        """Whether the network wants SDXL's sizes."""
        return "time_ids" in self.wants

    @property
    def requires_aesthetics_score(self) -> bool:
        """Whether the network is told an aesthetic score in place of the target size: SDXL's refiner."""
        return bool(self.options.get("requires_aesthetics_score"))

    @property
    def default_size(self) -> int:
        """Pixels along each side of the pictures that the network was trained on."""
        return (self.network.config.sample_size or 64) * self.autoencoder.config.factor

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks by component name, in the order in which a picture needs them."""
        return {**self.text.modules, self.network.component: self.network, "vae": self.autoencoder}

    def to(self, device: torch.device | str, torch_dtype: torch.dtype) -> "System":
        """Move every part. SDXL's autoencoder overflows in float16: it stays in float32 where its config says so."""
        for name, module in self.modules().items():
            upcast = name == "vae" and self.is_xl and self.autoencoder.config.force_upcast
            dtype = torch.float32 if upcast and torch_dtype == torch.float16 else torch_dtype
            quantized = module is self.network and self.quantization is not None
            module.to(device=device, dtype=None if quantized else dtype)
        # With channels last convolutions need not bring maps into another order and back. A CPU's have packed weights,
        # but for some of the autoencoder's, whose maps are large.
        last = [self.autoencoder, *([self.network] if torch.device(device).type == "cuda" else [])]
        for module in last:
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return self

    def quantize(self, kind: Quantization) -> None:
        """Hold the network's weights in fewer bits from now on; no more can it be saved. Raises UserError."""
        quantize(self.network, kind)
        self.quantization = kind

    def condition(
        self,
        text: Condition,
        sizes: Tensor | None = None,
        channels: Tensor | None = None,
        aesthetic_score: float | Tensor = AESTHETIC_SCORES[0],
        guidance: float | Tensor | None = None,
    ) -> Condition:
        """Build the condition that the network wants; all that is trained and drawn gets its condition here.

        text: the text encoder's. sizes: (B, 6), SDXL's (see `Condition.time_ids`). channels: see `Condition`.
        aesthetic_score: one for all or (B,), commonly 1 to 10, for SDXL's refiner. guidance: the scale, one for
        all or (B,), for a network that is told it. Of the text, the sizes, the score and the guidance, what is not
        wanted is left out. Raises UserError where a part is missing, or there are channels that the
        network does not take.
        """
        if sizes is not None and self.requires_aesthetics_score:
            score = torch.as_tensor(aesthetic_score).to(sizes).expand(len(sizes))
            sizes = torch.cat([sizes[:, :4], score[:, None]], dim=1)
        wants, parts = self.wants, {**text.parts(), "time_ids": sizes}
        if guidance is not None and "guidance" in wants:
            device = next(iter(text.parts().values())).device
            scale = torch.as_tensor(guidance, dtype=torch.float32, device=device)
            parts["guidance"] = scale.expand(text.rows)
        wanted = {name: part for name, part in parts.items() if name in wants and part is not None}
        condition = replace(Condition.of(wanted), channels=channels)
        condition.require(wants, f"the {self.network.component}")
        return condition

    def bind(
        self,
        condition: Condition,
        controls: Controls | None = None,
        reuse: FeatureReuse | None = None,
        merging: float = 0.0,
    ) -> BoundNetwork:
        """Return the network under a condition of R rows; a call of fewer rows is under the last of them.

        condition: on the network's device, in its precision. controls: what steers it beside that. reuse, merging:
        approximations, see `call`; `reuse` is of this condition alone.
        """
        return BoundNetwork(self.network, condition, controls, reuse, merging)

    def checkpoint(self) -> Checkpoint:
        """Return configs and tensors as files hold them.

        A part that came from a file of less precision than it is held in goes back into that precision where nothing is
        lost by it: what is only loaded in float32, or held there so as not to overflow, stays as small as it was.
        Raises UserError for a quantized system.
        """
        if self.quantization is not None:
            raise UserError(
                f"the network's weights are quantized ({self.quantization}), and no file's layout has such: load the "
                "model without quantization, and save that"
            )
        parts = {
            self.network.component: (self.network.config.to_diffusers(), self.network.state_dict()),
            "vae": (self.autoencoder.config.to_diffusers(), self.autoencoder.state_dict()),
            **export(self.text),
        }
        configs = {name: config for name, (config, _) in parts.items()} | {
            "scheduler": self.scheduler.to_dict()
        }
        tensors = {name: _in_precision(each, self.precision.get(name)) for name, (_, each) in parts.items()}
        return Checkpoint(self.pipeline, configs, tensors, dict(self.options))

    def save(self, folder: str | Path) -> None:
        """Write a diffusers folder, whole or not at all."""
        write_folder(folder, self.checkpoint(), self.write_beside)

    def write_beside(self, folder: Path) -> None:
        """Write what a Checkpoint does not hold into a new folder of this system: tokenizers, what is for previews."""
        write_tokenizers(self.text, folder)
        if self.preview is not None:
            write_component(folder, PREVIEW, *read_component(self.preview.parent, self.preview.name))

    def save_single_file(self, path: str | Path) -> None:
        """Write one `.safetensors` in the LDM layout (SD 1.x, 2.x, XL, its refiner), whole or not at all."""
        write_single_file(path, self.checkpoint())


def _network_of(checkpoint: Checkpoint, path: Path) -> type[DenoisingNetwork]:
    """The kind of network that a checkpoint's pipeline denoises with. Raises UserError for one that is not known."""
    found = [each for each in NETWORKS.values() if checkpoint.pipeline in each.pipelines]
    if not found:
        known = [name for each in NETWORKS.values() for name in each.pipelines]
        raise UserError(
            f"{path} holds a {checkpoint.pipeline or 'system of no name'}: what is drawn with here is a "
            f"{' or '.join(known[:2])}"
        )
    named = {str(checkpoint.configs.get(each.component, {}).get("_class_name")) for each in found}
    return next((each for name, each in NETWORKS.items() if name in named and each in found), found[0])


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return ten hex digits over names, shapes, dtypes and the first 64 values of every tensor.

    Enough to tell checkpoints apart, since training moves some of the first values of every tensor that it trains,
    without reading gigabytes.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        some = tensor.detach().flatten()[:64].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:10]


def _identity(checkpoint: Checkpoint, scheduler: SchedulerConfig) -> str:
    """A fingerprint of all that draws: the networks, and the scheduler's settings.

    Names of text encoders' tensors differ between those who write them: there the tensors alone count.
    """
    digest = hashlib.sha256(json.dumps(scheduler.to_dict(), sort_keys=True).encode())
    for part in sorted(checkpoint.tensors):
        tensors = {k: v for k, v in checkpoint.tensors[part].items() if v.is_floating_point()}
        if part.startswith("text_encoder"):
            alone = sorted(fingerprint({"": tensor}) for tensor in tensors.values())
            digest.update(" ".join(alone).encode())
        else:
            digest.update(fingerprint(tensors).encode())
    return digest.hexdigest()[:10]


def _precisions(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, torch.dtype]:
    """The precision of each part's weights, where all of them have one."""
    found = {
        part: {each.dtype for each in own.values() if each.is_floating_point()}
        for part, own in tensors.items()
    }
    return {part: dtypes.pop() for part, dtypes in found.items() if len(dtypes) == 1}


def _in_precision(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in a precision of fewer bytes, if every one of them is exactly the same in it; else as they are."""
    kept = dict(tensors)
    if dtype is None:
        return kept
    wide = {
        name: each
        for name, each in kept.items()
        if each.is_floating_point() and each.element_size() > dtype.itemsize
    }
    narrow = {name: each.to(dtype) for name, each in wide.items()}
    exact = all(torch.equal(each.to(wide[name].dtype), wide[name]) for name, each in narrow.items())
    return kept | narrow if exact else kept


def _check_options(options: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for defaults of a model_index.json, or a like file at `path`, that no call could use."""
    for name, kinds in (("num_inference_steps", int), ("guidance_scale", int | float)):
        if name in options and (isinstance(options[name], bool) or not isinstance(options[name], kinds)):
            raise UserError(f"{path} gives {name} as {options[name]!r:.60}: make it a number")
    if not isinstance(options.get("requires_aesthetics_score", False), bool):
        said = f"{options['requires_aesthetics_score']!r:.60}"
        raise UserError(f"{path} gives requires_aesthetics_score as {said}: make it true or false")


def filled(kind: type[M], config: Any, checkpoint: Checkpoint, part: str, path: Path) -> M:
    """Return the network of a component, frozen, on the checkpoint's own tensors. Raises UserError."""
    check_layers(config.layers, f"{path}: {part}", len(checkpoint.tensors[part]))
    with torch.device("meta"):
        module = kind(config)
    load_strict(module, checkpoint.tensors[part], f"{path}: {part}")
    return module.eval().requires_grad_(False)
