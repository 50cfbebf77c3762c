"""diffusers' own modules, converted by OpenVINO at fixed shapes."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.parts import (
    NETWORKS,
    Contender,
    Draw,
    Job,
    Shapes,
    guidance_scale,
    pipeline,
    their_picture,
    unet_step,
    vae_decode,
    vae_encode,
)

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class _Module(nn.Module):
    """A function of tensors with the module that it calls, as the converter wants them."""

    def __init__(self, held: nn.Module, call: Callable[..., Tensor]):
        super().__init__()
        self.held, self.call = held, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def openvino(contender: Contender, job: Job) -> Draw:
    """A part by OpenVINO, in the precision that it is asked to compute in."""
    import diffusers

    shapes = Shapes.read(job.model)
    if job.part == "picture":
        return _picture(contender, job, shapes)
    kind: Any = diffusers.UNet2DConditionModel if job.part == "step" else diffusers.AutoencoderKL
    loaded = kind.from_pretrained(job.model, subfolder=NETWORKS[job.part], torch_dtype=torch.float32)
    make = {"step": unet_step, "decode": vae_decode, "encode": vae_encode}[job.part]
    inputs = shapes.inputs(job.part, job.pictures)
    call = converted(loaded, make(loaded, shapes), inputs, contender)
    return lambda turn: call(*inputs)


def converted(
    held: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], contender: Contender
) -> Callable[..., Tensor]:
    """The function, compiled for inputs of these shapes.

    Fixed shapes in float32 end the process in OpenVINO 2026.4.1, so in float32 its rows are left open, but where a
    single picture is all that goes in.
    """
    ov: Any = importlib.import_module("openvino")
    fixed = contender.dtype != "float32" or (len(inputs) == 1 and len(inputs[0]) == 1)
    sizes = [list(each.shape) if fixed or each.ndim == 1 else [-1, *each.shape[1:]] for each in inputs]
    model = ov.convert_model(_Module(held.eval(), call), example_input=inputs, input=sizes)
    hints = {"INFERENCE_PRECISION_HINT": _HINTS[contender.dtype or "float32"], "PERFORMANCE_HINT": "LATENCY"}
    request = ov.compile_model(model, "CPU", hints).create_infer_request()

    def run(*given: Tensor) -> Tensor:
        found = request.infer([each.contiguous().numpy() for each in given], share_inputs=True)
        return torch.from_numpy(found[0].copy())

    return run


def _picture(contender: Contender, job: Job, shapes: Shapes) -> Draw:
    """diffusers' pipeline, in which the U-Net and the decoder are OpenVINO's."""
    pipe = pipeline(Contender(contender.name, "diffusers"), job.model)
    unet, vae = pipe.unet, pipe.vae
    inputs = shapes.inputs("step", job.pictures)
    if guidance_scale(job.model) <= 1:  # a row a picture, where guidance has two
        inputs = tuple(each[: job.pictures] if len(each) > 1 else each for each in inputs)
    step = converted(unet, unet_step(unet, shapes), inputs, contender)
    raw = shapes.inputs("decode", job.pictures)
    decode = converted(vae, lambda z: vae.decode(z, return_dict=False)[0], raw, contender)

    def denoised(x: Tensor, timestep: Any, encoder_hidden_states: Tensor, **more: Any) -> tuple[Tensor]:
        added = more.get("added_cond_kwargs") or {}
        told = [added[name].float() for name in ("text_embeds", "time_ids") if name in added]
        when = torch.as_tensor(timestep, dtype=torch.float32).reshape(1)
        return (step(x, when, encoder_hidden_states, *told),)

    pipe.unet.forward = denoised
    pipe.vae.decode = lambda z, **more: (decode(z),)
    return their_picture(pipe, job, shapes)
