"""The optimizer, and the learning rate as a function of the pictures seen."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.training.bounds import refuse_outside

Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its learning rate; every count is in pictures.

    kind: "adamw8bit" keeps its moments in 8 bits, through bitsandbytes, on CUDA. A run that is resumed ends with the
        same bits with "adamw" only.
    schedule: as transformers' `get_scheduler` names them. warmup_stable_decay (Hägele et al. 2024) falls linearly to
        zero over the last share `decay` of the run, so that a run can be prolonged from before it.
    warmup: from 0 to the full rate. With warmup_stable_decay it is cut to what the decay leaves; with the others,
        but for "constant", which has none, it must be shorter than the run.
    clip_norm: the gradient's norm is kept at or below it; 0 leaves it.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 5e-4
    schedule: Schedule = "warmup_stable_decay"
    warmup: int = 10_000
    decay: float = 0.3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError for values that can't be."""
        rates = ("learning_rate", "warmup", "weight_decay", "eps", "clip_norm")
        refuse_outside("loop.optimizer", self, rates, 0)
        refuse_outside("loop.optimizer", self, ("decay",), 0, 1)
        refuse_outside("loop.optimizer", self, ("beta1", "beta2"), 0, 0.999999)


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Raises UserError where bitsandbytes is asked for and not there, or nothing would be trained."""
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise UserError("nothing would be trained: no parameter requires a gradient")
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
        "eps": config.eps,
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(trained, **settings, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "loop.optimizer.kind adamw8bit needs bitsandbytes: pip install bitsandbytes, or use adamw"
        ) from error
    return AdamW8bit(trained, **settings)


def odd_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor], seen: int
) -> list[str]:
    """Return what can't be of a parameter's moments, saved after `seen` pictures: by name, with what is odd.

    The kernels of an optimizer trust names, shapes and dtypes.
    """
    wanted = _moments_of(optimizer, parameter)
    odd = [
        f"{key} is {'missing' if key in wanted else 'unknown'}"
        for key in sorted(wanted.keys() ^ state.keys())
    ]
    for key, (shape, dtype) in wanted.items():
        each = state.get(key)
        if each is None:
            continue
        if (each.shape, each.dtype) != (shape, dtype):
            odd.append(f"{key} is {tuple(each.shape)} {each.dtype} for {tuple(shape)} {dtype}")
        elif key == "step" and not 1 <= float(each) <= seen:
            odd.append(f"step is {float(each):g} after {seen} pictures")
        elif key == "exp_avg_sq" and each.numel() and not float(each.min()) >= 0:
            odd.append("exp_avg_sq is negative, a mean of squares")
    return odd


def _moments_of(
    optimizer: torch.optim.Optimizer, parameter: Tensor
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and dtype of what the optimizer keeps of a parameter, by name."""
    made: dict[str, Any]
    make: Any = getattr(optimizer, "init_state", None)
    if make:  # bitsandbytes tells by making it, as its version and the size have it
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        index = next(i for i, p in enumerate(group["params"]) if p is parameter)
        make(group, parameter, optimizer.param_groups.index(group), index)
        made = optimizer.state.pop(parameter)
        made = {key: torch.as_tensor(each) for key, each in made.items()}
        return {key: (each.shape, each.dtype) for key, each in made.items()}
    own = parameter.shape, parameter.dtype
    return {"step": (torch.Size(), torch.float32), "exp_avg": own, "exp_avg_sq": own}


def warmup_of(config: OptimizerConfig, pictures: int) -> int:
    """Return how many pictures the warm-up of a run of `pictures` takes. Raises UserError where it would never end."""
    if config.schedule == "warmup_stable_decay":
        return min(config.warmup, pictures - _decay_of(config, pictures))
    if config.schedule != "constant" and 0 < pictures <= config.warmup:
        raise UserError(
            f"loop.optimizer.warmup is {config.warmup} pictures, in a run of {pictures} that would never end: set it "
            f"to {pictures // 10}, say, or train longer"
        )
    return config.warmup


def learning_rate(config: OptimizerConfig, pictures: int) -> Callable[[int], float]:
    """Return the learning rate by pictures seen, for a run of `pictures`: the library's schedule, which holds no state.

    As in transformers, the first step of a warm-up has a rate of 0. Raises UserError where it would never end.
    """
    import transformers

    settings = None
    if config.schedule == "warmup_stable_decay":
        settings = {"num_decay_steps": _decay_of(config, pictures), "decay_type": "linear"}
    unused = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    warmup = warmup_of(config, pictures)
    schedule = transformers.get_scheduler(config.schedule, unused, warmup, pictures, settings)
    (factor,) = schedule.lr_lambdas  # type: ignore[union-attr]
    return lambda seen: config.learning_rate * factor(seen)


def _decay_of(config: OptimizerConfig, pictures: int) -> int:
    """How many pictures a decay of its own takes."""
    return round(config.decay * pictures)
