"""Fields of the settings: default, help, limits and flag in one place; to JSON and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, TypeVar, get_origin, get_type_hints

Config = TypeVar("Config")


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that is also a flag; ``low`` and ``high`` are inclusive limits."""
    metadata = {"help": help, "flag": flag, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of ``to_dict``; an unknown key is an error that names it."""
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(
            f"config: {cls.__name__} has no {sorted(unknown)}; it knows {sorted(hints)}. "
            "The file is from another version of protoclip, or misspelt"
        )
    return cls(**{key: _typed(hints[key], value) for key, value in values.items()})


def _typed(hint: Any, value: Any) -> Any:
    """A value of JSON as a field has it: nested configs, and tuples of one or more."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if get_origin(hint) is tuple:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value


def flag_of(item: dataclasses.Field) -> str:
    return "--" + (item.metadata["flag"] or item.name.replace("_", "-"))


def check(config: Any) -> None:
    """Raise ValueError, by flag name, for the first value out of its limits or choices."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check(value)
            continue
        for one in value if isinstance(value, tuple) else (value,):
            _check_value(item, one)


def _check_value(item: dataclasses.Field, value: Any) -> None:
    low, high, choices = (item.metadata[key] for key in ("low", "high", "choices"))
    if choices is not None and value not in choices:
        raise ValueError(f"{flag_of(item)}: expected one of {', '.join(choices)}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{flag_of(item)}: expected a finite number, got {value}")
    if low is not None and value < low:
        raise ValueError(f"{flag_of(item)}: expected at least {low}, got {value}")
    if high is not None and value > high:
        raise ValueError(f"{flag_of(item)}: expected at most {high}, got {value}")
