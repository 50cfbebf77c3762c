"""Settings that can't be, refused in one way."""

import math
from collections.abc import Iterable

from ldm.diffusion.losses import LossConfig
from ldm.errors import UserError


def refuse_outside(
    section: str, config: object, names: Iterable[str], least: float, most: float = math.inf
) -> None:
    """Raise UserError for the first setting below `least` or above `most`, or no finite number.

    None is a setting that is left open, and passes.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            and_most = "" if most == math.inf else f" and at most {most}"
            raise UserError(f"{section}.{name} is {value}: make it {least} or more{and_most}")


def refuse_loss(section: str, loss: LossConfig) -> None:
    """Raise UserError for the first setting of a loss that can't be."""
    weights = ("p2_gamma", "p2_k", "offset_noise", "input_perturbation", "variance")
    refuse_outside(section, loss, weights, 0)
    refuse_outside(section, loss, ("gamma", "timestep_shift"), 0.001)
    refuse_outside(section, loss, ("levels",), 2)
