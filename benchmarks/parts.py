"""The parts of drawing, each by diffusers and by ours, from the same folder and the same input.

`benchmarks.contenders.build` makes one contender's work of one part, in whatever process it is called.
"""

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
PARTS = ("step", "decode", "encode", "text", "picture")
NETWORKS = {"step": "unet", "decode": "vae", "encode": "vae"}  # of which one is enough
# What does a round's work: given the round's number, of which only prompts depend.
Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class Contender:
    """Who computes, and how.

    maker: "diffusers", "openvino" (diffusers' modules, converted) or "ours". dtype: None leaves it to the maker's
    default. tuned: channels last, projections of attention fused. compiled: by torch.compile; ours by `pipe.compile`.
    """

    name: str
    maker: str
    dtype: str | None = None
    tuned: bool = False
    compiled: bool = False
    backend: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype or "float32")


@dataclass(frozen=True)
class Job:
    """What is computed of a model's folder. steps: of a picture."""

    model: str
    part: str
    pictures: int = 1
    steps: int = 20
    prompt: str = "a raccoon astronaut"

    def prompts(self, turn: int = 0) -> list[str]:
        """The pictures' prompts; new ones each round, since ours remembers embeddings."""
        return [f"{self.prompt}, {turn} {k}" for k in range(self.pictures)]


@dataclass(frozen=True)
class Shapes:
    """What the inputs of a model's parts look like. side: of latents. pooled: 0 where the U-Net takes none."""

    channels: int
    side: int
    factor: int
    context: int
    tokens: int
    pooled: int
    scale: float
    shift: float

    @classmethod
    def read(cls, model: str | Path) -> "Shapes":
        """Read a diffusers folder's configs."""

        def read(place: str) -> dict[str, Any]:
            return json.loads((Path(model) / place).read_text(encoding="utf-8"))

        unet, vae = read("unet/config.json"), read("vae/config.json")
        sizes = 6 * (unet.get("addition_time_embed_dim") or 0)
        return cls(
            vae["latent_channels"],
            unet["sample_size"],
            2 ** (len(vae["block_out_channels"]) - 1),
            unet["cross_attention_dim"],
            read("tokenizer/tokenizer_config.json").get("model_max_length") or 77,
            (unet.get("projection_class_embeddings_input_dim") or sizes) - sizes,
            vae["scaling_factor"],
            vae.get("shift_factor") or 0.0,
        )

    @property
    def pixels(self) -> int:
        return self.side * self.factor

    def noise(self, rows: int) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return torch.randn(rows, self.channels, self.side, self.side, generator=rng)

    def inputs(self, part: str, pictures: int) -> tuple[Tensor, ...]:
        """What a network of a part is called with, in float32; a step is guided, of two rows a picture."""
        rng = torch.Generator().manual_seed(1)
        if part == "decode":
            return (self.noise(pictures),)
        if part == "encode":
            coarse = torch.rand(pictures, 3, 16, 16, generator=rng)
            return (torch.nn.functional.interpolate(coarse, self.pixels, mode="bicubic").clamp(0, 1),)
        rows, side = 2 * pictures, float(self.pixels)
        given = (self.noise(rows), torch.tensor([500.0]))
        given += (torch.randn(rows, self.tokens, self.context, generator=rng),)
        if self.pooled:
            sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(rows, 6).contiguous()
            given += (torch.randn(rows, self.pooled, generator=rng), sizes)
        return given


def device() -> torch.device:
    """Where all compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet() -> None:
    """Have diffusers, and what converts it, show no bars and no warnings for programmers."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    for package in (diffusers, transformers):
        own: Any = package.utils.logging
        own.set_verbosity_error()
        own.disable_progress_bar()


def timed(draw: Draw) -> Callable[[int], tuple[float, Any]]:
    """A round's work with its seconds; an accelerator has done what it was asked for before the clock is read."""

    def work(turn: int) -> tuple[float, Any]:
        _wait()
        started = time.perf_counter()
        out = draw(turn)
        _wait()
        return time.perf_counter() - started, out.float().cpu().numpy()

    return work


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# diffusers


def theirs(contender: Contender, job: Job) -> Draw:
    """A part by diffusers: of a network's part this network alone is loaded."""
    shapes = Shapes.read(job.model)
    if job.part in NETWORKS:
        call = network(contender, job.model, job.part, shapes)
        inputs = [each.to(device()) for each in shapes.inputs(job.part, job.pictures)]
        return lambda turn: call(*inputs)
    if job.part == "text":
        return _their_text(contender, job)
    return their_picture(pipeline(contender, job.model), job, shapes)


def network(contender: Contender, model: str, part: str, shapes: Shapes) -> Callable[..., Tensor]:
    """diffusers' network of a part, as a function of `Shapes.inputs` in float32 and of its precision's output."""
    import diffusers

    kind: Any = diffusers.UNet2DConditionModel if part == "step" else diffusers.AutoencoderKL
    loaded = kind.from_pretrained(model, subfolder=NETWORKS[part], torch_dtype=contender.torch_dtype)
    loaded = _tuned(loaded.to(device()), contender)
    call = {"step": unet_step, "decode": vae_decode, "encode": vae_encode}[part](loaded, shapes)
    return torch.compile(call) if contender.compiled else call


def unet_step(unet: Any, shapes: Shapes) -> Callable[..., Tensor]:
    def call(x: Tensor, timestep: Tensor, hidden: Tensor, *more: Tensor) -> Tensor:
        dtype = unet.dtype
        added = {"text_embeds": more[0].to(dtype), "time_ids": more[1]} if more else None
        return unet(x.to(dtype), timestep, hidden.to(dtype), added_cond_kwargs=added, return_dict=False)[0]

    return call


def vae_decode(vae: Any, shapes: Shapes) -> Callable[..., Tensor]:
    def call(latents: Tensor) -> Tensor:
        unscaled = (latents / shapes.scale + shapes.shift).to(vae.dtype)
        return (vae.decode(unscaled, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    return call


def vae_encode(vae: Any, shapes: Shapes) -> Callable[..., Tensor]:
    def call(pictures: Tensor) -> Tensor:
        moments = vae.encode((pictures * 2 - 1).to(vae.dtype), return_dict=False)[0]
        return (moments.mean.float() - shapes.shift) * shapes.scale

    return call


def _tuned(network: Any, contender: Contender) -> Any:
    if contender.tuned:
        network = network.to(memory_format=torch.channels_last)
        network.fuse_qkv_projections()
    if contender.compiled and device().type == "cpu":
        from torch._inductor import config

        config.freezing = True
    return network


def pipeline(contender: Contender, model: str, **parts: Any) -> Any:
    """diffusers' pipeline of the folder; a part that is None is not loaded."""
    import diffusers

    kind: Any = diffusers.DiffusionPipeline
    index = json.loads((Path(model) / "model_index.json").read_text(encoding="utf-8"))
    unwanted = {"safety_checker": None} if "safety_checker" in index else {}
    pipe = kind.from_pretrained(
        model, torch_dtype=contender.torch_dtype, local_files_only=True, **unwanted, **parts
    ).to(device())
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "vae"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, _tuned(getattr(pipe, name), contender))
    if contender.compiled and pipe.unet is not None:
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return pipe


def _their_text(contender: Contender, job: Job) -> Draw:
    pipe = pipeline(contender, job.model, unet=None, vae=None)

    def draw(turn: int) -> Tensor:
        prompts = job.prompts(turn)
        given = {"device": device(), "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        text, against = pipe.encode_prompt(prompts, negative_prompt=[""] * len(prompts), **given)[:2]
        return torch.cat([against, text])

    return draw


def their_picture(pipe: Any, job: Job, shapes: Shapes) -> Draw:
    noise, scale = shapes.noise(job.pictures), guidance_scale(job.model)

    def draw(turn: int) -> Tensor:
        prompts = job.prompts(turn)
        told = {"num_inference_steps": job.steps, "guidance_scale": scale, "output_type": "np"}
        latents = noise.to(device(), pipe.unet.dtype)
        images = pipe(prompts, negative_prompt=[""] * len(prompts), latents=latents, **told).images
        return torch.as_tensor(images).permute(0, 3, 1, 2)

    return draw


def guidance_scale(model: str) -> float:
    """What the folder's index says, else 7.5; both sides are told it."""
    index = json.loads((Path(model) / "model_index.json").read_text(encoding="utf-8"))
    return index.get("guidance_scale", 7.5)


# Ours


def ours(contender: Contender, job: Job) -> tuple[Draw, torch.dtype]:
    """A part by ours, through the pipeline as a user loads it, and the pipeline's precision."""
    from ldm.condition import Condition
    from ldm.conditioning.text import encode_pair
    from ldm.sampling import decode, encode

    pipe = our_pipeline(contender, job.model)
    shapes, system = Shapes.read(job.model), pipe.system
    if job.part == "text":

        def text(turn: int) -> Tensor:
            prompts = job.prompts(turn)
            positive, negative, _ = encode_pair(system.text, prompts, [""] * len(prompts))
            return torch.cat([negative.text, positive.text])

        return text, pipe.dtype
    if job.part == "picture":
        return _our_picture(pipe, job, shapes), pipe.dtype
    inputs = [each.to(pipe.device) for each in shapes.inputs(job.part, job.pictures)]
    autoencoder = system.autoencoder
    if job.part != "step":
        call = decode if job.part == "decode" else encode
        return (lambda turn: call(autoencoder, inputs[0])), pipe.dtype
    x, timestep, hidden, *more = inputs
    named = dict(zip(("hidden", "pooled", "time_ids"), (hidden, *more), strict=False))
    bound = system.bind(Condition.of(named).to(pipe.device, pipe.dtype))
    timesteps = timestep.expand(len(x))
    return (lambda turn: bound(x, timesteps)), pipe.dtype


def our_pipeline(contender: Contender, model: str) -> Any:
    """Our pipeline of the folder, as a user loads it."""
    from pipelines import TextToImagePipeline

    told: dict[str, Any] = {"device": device()}
    if contender.dtype:
        told["torch_dtype"] = contender.torch_dtype
    if contender.backend:
        told["backend"] = contender.backend
    pipe: Any = TextToImagePipeline.from_pretrained(model, **told)
    if contender.compiled:
        pipe.compile()
    return pipe


def has_backend(dtype: str) -> bool:
    """Whether our pipeline can compute by OpenVINO here, in this precision."""
    from ldm.backends import openvino
    from ldm.errors import UserError

    try:
        openvino.check(torch.device("cpu"), getattr(torch, dtype))
    except UserError:
        return False
    return True


def _our_picture(pipe: Any, job: Job, shapes: Shapes) -> Draw:
    noise, scale = shapes.noise(job.pictures), guidance_scale(job.model)

    def draw(turn: int) -> Tensor:
        prompts = job.prompts(turn)
        told = {"num_inference_steps": job.steps, "guidance_scale": scale, "output_type": "np"}
        given = {"negative_prompt": [""] * len(prompts), "latents": noise, "progress": False}
        return torch.as_tensor(pipe(prompts, **given, **told).images).permute(0, 3, 1, 2)

    return draw
