"""Network configs as diffusers writes them: the keys we build from, and the keys whose only built value is known.

A `config.json` of diffusers has many keys that no Stable Diffusion network uses. A key that we do not build from is
accepted with its inert value and refused with any other, so that no setting is ever dropped in silence.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ldm.config import from_dict
from ldm.errors import UserError

T = TypeVar("T")
LARGEST = 2**22  # of a width, a picture's side or a count of labels
MOST_LAYERS = 1000
MOST_LEVELS = 16
MOST_VALUES = 1000


def parse(
    cls: type[T],
    mapping: Mapping[str, Any],
    inert: Mapping[str, tuple[Any, ...]],
    class_name: str,
    where: str,
) -> T:
    """Build a config dataclass from a diffusers `config.json`.

    class_name: the `_class_name` that it must have, if it has one. Raises UserError that names an unsupported key.
    """
    named = mapping.get("_class_name", class_name)
    if named != class_name:
        raise UserError(
            f"{where}: _class_name is {named!r:.60}, another network than the {class_name} wanted here"
        )
    own = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    for key, value in mapping.items():
        if key.startswith("_"):  # _diffusers_version, _name_or_path
            continue
        if isinstance(value, list | tuple) and len(value) > MOST_VALUES:
            raise UserError(f"{where}: {key} has {len(value):,} values: at most {MOST_VALUES} are read")
        if key in own:
            known[key] = value
        elif key not in inert:
            raise UserError(f"{where}: the setting {key!r:.60} is not one this network knows")
        elif value is not None and value not in inert[key]:
            raise UserError(f"{where}: {key} = {value!r:.60} is not supported (supported: {inert[key][0]!r})")
    return from_dict(cls, known, where=where)


def to_diffusers(config: Any, class_name: str, ours: Collection[str] = ()) -> dict[str, Any]:
    """Return the `config.json` that diffusers' `class_name` is built from.

    ours: settings that diffusers does not know, left out where they are None.
    """
    listed = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()
        if value is not None or key not in ours
    }
    return {"_class_name": class_name, **listed}


def check_sizes(config: Any, where: str, *names: str, least: int = 1) -> None:
    """Raise UserError unless these settings are whole numbers (or some, or None), `least` to LARGEST; no empty list.

    Layers and levels are at most MOST_LAYERS and MOST_LEVELS: networks are built before their weights are looked for.
    """
    for name in names:
        value = getattr(config, name)
        each = value if isinstance(value, tuple) else () if value is None else (value,)
        if value == () or min(each, default=least) < least:
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(f"{where}: {name} is {shown!r:.60}, where sizes of at least {least} are needed")
        most = MOST_LAYERS if "layers" in name else LARGEST
        if max(each, default=1) > most or len(each) > MOST_LEVELS:
            raise UserError(
                f"{where}: {name} is {max(each)!r:.60} or has {len(each)} values: at most {MOST_LEVELS} values up to "
                f"{most} are built"
            )


def check_finite(config: Any, where: str, *names: str) -> None:
    """Raise UserError for numbers (or several, or None) among these settings that are NaN or infinite."""
    for name in names:
        value = getattr(config, name)
        each = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(map(math.isfinite, each)):
            raise UserError(f"{where}: {name} is {value!r:.60}, where a finite number is needed")


def check_choice(config: Any, where: str, name: str, known: Collection[str]) -> None:
    """Raise UserError for a setting that is none of those that are known."""
    value = getattr(config, name)
    if value not in known:
        raise UserError(f"{where}: {name} {value!r:.60} is not supported (supported: {', '.join(known)})")


def check_layers(layers: int, where: str, tensors: int | None = None) -> None:
    """Raise UserError for a network of more layers than are built, or than a file of so many `tensors` can fill."""
    most = MOST_LAYERS if tensors is None else min(tensors, MOST_LAYERS)
    if layers > most:
        held = "" if tensors is None else f" (the file has {tensors} tensors)"
        raise UserError(f"{where}: the settings are those of {layers:,} layers, where {most} can be{held}")


def check_groups(widths: tuple[int, ...], groups: int, where: str) -> None:
    """Raise UserError unless the normalisation's groups divide every width."""
    if odd := [width for width in widths if width % groups]:
        raise UserError(f"{where}: norm_num_groups {groups} does not divide the block_out_channels {odd[0]}")


def per_level(value: int | tuple[int, ...], levels: int, name: str, where: str) -> tuple[int, ...]:
    """Return one value for each level of a network; a single number stands for all of them."""
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise UserError(f"{where}: {name} has {len(values)} values for a network of {levels} levels")
    return values
