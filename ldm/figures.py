"""Plots, by matplotlib, which is not needed for anything else."""

from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches. Raises UserError where matplotlib isn't installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('a plot needs matplotlib: pip install "ldm-text-to-image[batch]"') from error
    return Figure(figsize=(width, height), layout="constrained")
