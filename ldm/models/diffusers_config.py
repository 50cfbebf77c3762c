"""Network configs as diffusers writes them: the keys we build from, and the keys whose only built value is known.

A `config.json` of diffusers has many keys that no Stable Diffusion network uses. A key that we do not build from is
accepted with its inert value and refused with any other, so that no setting is ever dropped in silence.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ldm.config import from_dict
from ldm.errors import UserError

T = TypeVar("T")


def parse(cls: type[T], mapping: Mapping[str, Any], inert: Mapping[str, tuple[Any, ...]], where: str) -> T:
    """A config dataclass from a diffusers `config.json`. Raises UserError that names an unsupported key."""
    own = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    for key, value in mapping.items():
        if key.startswith("_"):  # _class_name, _diffusers_version, _name_or_path
            continue
        if key in own:
            known[key] = value
        elif key not in inert:
            raise UserError(f"{where}: the setting {key!r} is not one this network knows")
        elif value is not None and value not in inert[key]:
            raise UserError(f"{where}: {key} = {value!r} is not supported (supported: {inert[key][0]!r})")
    return from_dict(cls, known, where=where)


def to_diffusers(config: Any, class_name: str, ours: Collection[str] = ()) -> dict[str, Any]:
    """The `config.json` that diffusers' `class_name` is built from.

    ours: settings that diffusers does not know, left out where they are None.
    """
    listed = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(config).items()
        if value is not None or key not in ours
    }
    return {"_class_name": class_name, **listed}


def per_level(value: int | tuple[int, ...], levels: int, name: str) -> tuple[int, ...]:
    """One value for each level of a network; a single number stands for all of them."""
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise UserError(f"{name} has {len(values)} values for a network of {levels} levels")
    return values
