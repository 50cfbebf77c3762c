"""What a part costs: its floating-point operations, the most that the processor does, and where its time goes."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders import build
from benchmarks.parts import Contender, Job, Shapes, device, unet_step, vae_decode, vae_encode

# Parts of an operator's name, of which the first that fits says its kind.
_KINDS = {
    "attention products": ("scaled_dot_product", "flash", "bmm", "fmha"),
    "softmax": ("softmax",),
    "convolution": ("conv",),
    "linear": ("addmm", "aten::mm", "linear", "gemm"),
    "norm": ("norm",),
    "copies": ("copy", "cat", "clone", "contiguous", "reorder", "to_dense", "to_mkldnn", "upsample", "fill", "pad"),
    "elementwise": (
        "silu", "gelu", "add", "mul", "div", "sub", "sigmoid", "exp", "clamp", "neg", "pow", "sin", "cos", "erf",
        "triton", "vectorized", "elementwise",
    ),
}  # fmt: skip


def flops(model: str, part: str, pictures: int) -> int:
    """Count a network's part, multiplications and additions, attention included: on tensors without memory.

    There attention is plain matrix products; the counter knows none of a CPU's kernels for it.
    """
    import diffusers
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    kind: Any = diffusers.UNet2DConditionModel if part == "step" else diffusers.AutoencoderKL
    shapes = Shapes.read(model)
    with torch.device("meta"), torch.no_grad():
        network = kind.from_config(kind.load_config(model, subfolder="unet" if part == "step" else "vae"))
        call = {"step": unet_step, "decode": vae_decode, "encode": vae_encode}[part](network, shapes)
        inputs = [each.to("meta") for each in shapes.inputs(part, pictures)]
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(*inputs)
    return counter.get_total_flops()


# The peak


def build_peak(kind: str, dtype: str, work: int) -> tuple[Callable[[int], tuple[float, Any]], dict[str, Any]]:
    """A round of large matrix products ("matrix") or convolutions of 3 x 3 ("convolution"), and their operations.

    work: the operations of what they are compared with, which a round shall not exceed by much.
    """
    torch.set_grad_enabled(False)
    cuda = device().type == "cuda"
    given: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device()}
    side = next(n for n in (8192, 4096, 2048, 1024) if n == 1024 or (2 * n**3 <= work and (cuda or n < 8192)))
    if kind == "matrix":
        one, other = torch.randn(side, side, **given), torch.randn(side, side, **given)
        operations = 2 * side**3

        def call() -> Any:
            return one @ other

    else:
        rows = {8192: 128, 4096: 8, 2048: 2, 1024: 1}[side]
        x = torch.randn(rows, 320, 64, 64, **given).to(memory_format=torch.channels_last)
        layer = torch.nn.Conv2d(320, 320, 3, padding=1, **given).to(memory_format=torch.channels_last)
        operations = 2 * 320 * 320 * 9 * 64 * 64 * rows

        def call() -> Any:
            return layer(x)

    def run(turn: int) -> tuple[float, Any]:
        best = float("inf")
        for _ in range(3):  # the best of three: a peak is what can be reached
            started = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return best, None

    run(0)
    return run, {"dtype": dtype, "operations": operations}


# Where the time goes


def build_profile(
    contender: Contender, job: Job
) -> tuple[Callable[[int], tuple[float, Any]], dict[str, Any]]:
    """A round under torch's profiler; what comes out is the seconds by kind of operator."""
    work, facts = build(contender, job)
    work(0)
    return (lambda turn: profiled(work)), facts


def profiled(work: Callable[[int], tuple[float, Any]]) -> tuple[float, dict[str, float]]:
    """Run once; return the seconds, and those of the operators alone by their kind, most first."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device().type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        seconds, _ = work(1)
    spent: dict[str, float] = {}
    for each in found.key_averages():
        own: Any = each
        time_of = own.self_device_time_total if cuda else own.self_cpu_time_total
        kind = kind_of(own.key)
        spent[kind] = spent.get(kind, 0) + time_of / 1e6
    return seconds, dict(sorted(spent.items(), key=lambda pair: -pair[1]))


def kind_of(operator: str) -> str:
    """Return the kind of an operator or kernel by its name."""
    name = operator.lower()
    return next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "other")
