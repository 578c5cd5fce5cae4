"""Reads typed fields from a config.json that may hold anything."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxreason.core.errors import UserError
from jaxreason.nn.rope import Scaling, scaling_from

_NONE: Any = object()


class Fields:
    """A mapping whose values are checked when they are read; errors name the file and the field."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self.where = values, where

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value."""
        return self._values.get(name, default)

    def refuse(self, name: str, expected: str) -> UserError:
        """The error for a field's value."""
        got = repr(self._values.get(name))
        got = got if len(got) <= 60 else got[:57] + "..."
        return UserError(f"{self.where}: {name} is {got}; expected {expected}")

    def _read(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is None and default is _NONE:
            raise UserError(f"{self.where}: {name} is missing; expected a model's config.json")
        return default if value is None else value

    def integer(self, name: str, default: int = _NONE, least: int = 1) -> int:
        """A whole number below 2^31; null counts as absent."""
        value = self._read(name, default)
        if value is default:
            return value
        if type(value) is not int or not least <= value < 2**31:
            raise self.refuse(name, f"a whole number from {least}")
        return value

    def optional_integer(self, name: str, default: int) -> int | None:
        """A whole number; absent is the default, null is None."""
        if name not in self._values:
            return default
        return None if self._values[name] is None else self.integer(name)

    def number(self, name: str, default: float = _NONE) -> float:
        """A finite positive number."""
        value = self._read(name, default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or abs(value) > 1e30 or not math.isfinite(value) or value <= 0:
            raise self.refuse(name, "a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """A finite positive number; None where it is absent or null."""
        return None if self._values.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._read(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def choice(self, name: str, known: Collection[str], default: str) -> str:
        """One of the known names."""
        value = self._read(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.refuse(name, f"one of {', '.join(known)}")
        return value

    def inner(self, name: str) -> "Fields":
        """The fields of an object inside; none where it is absent."""
        value = self._read(name, {})
        if not isinstance(value, Mapping):
            raise self.refuse(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def names(self) -> list[str]:
        """The fields that are there."""
        return list(self._values)


def rope(
    f: Fields, *, base: str = "rope_theta", fraction: str = "partial_rotary_factor", part=1.0
) -> tuple[float, Scaling, float]:
    """Base, scaling and rotated fraction, as transformers 4 or 5 write them.

    Raises:
      UserError: a scaling other than linear and llama3, or one for each kind of layer.
    """
    name = "rope_scaling" if f.get("rope_scaling") else "rope_parameters"
    p = f.inner(name)
    if nested := next((key for key in p.names() if isinstance(p.get(key), dict)), None):
        raise f.refuse(name, f"one setting for all layers, not one for {nested[:40]}")
    rotated = p.number("partial_rotary_factor", f.number(fraction, part))
    if rotated > 1:
        raise f.refuse(fraction, "at most 1")
    theta = p.number("rope_theta", f.number(base, 10_000.0))
    kind = p.get("rope_type") or p.get("type") or "default"
    if kind == "linear":
        entry = {"type": kind, "factor": p.number("factor")}
    elif kind == "llama3":
        outer = f.integer("original_max_position_embeddings", 0)
        trained = outer or f.integer("max_position_embeddings", 2048)
        names = ("factor", "low_freq_factor", "high_freq_factor")
        entry = {"type": kind} | {name: p.number(name) for name in names}
        length = "original_max_position_embeddings"
        entry[length] = outer or p.integer(length, trained)
    else:
        entry = {"type": kind if isinstance(kind, str) else str(kind)[:40]}
    return theta, scaling_from(entry, f"{f.where}: {name}"), rotated
