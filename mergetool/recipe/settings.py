"""The value of a setting for one tensor: filters by name, gradients over depth."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mergetool.recipe.tree import Path, Scalar


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Any = _Unset()
"""What a setting says about a tensor that none of its filters matches."""


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name the filter matches."""

    filter: str | None
    value: Scalar | tuple[Scalar, ...]
    """One value, or a gradient: values at equal distances over the depth of the model."""
    path: Path = ()
    """Where in its setting the condition is written."""

    @property
    def everywhere(self) -> bool:
        """Whether it matches every tensor."""
        return self.filter is None or self.filter == "*"

    def matches(self, name: str) -> bool:
        """Whether the filter matches a tensor's name."""
        return self.everywhere or matches(str(self.filter), name)


Setting = tuple[Condition, ...]
"""What a recipe says about one parameter; the first condition that matches wins."""


def setting(raw: Any) -> Setting:
    """The setting for plain data that the schema accepts."""
    if isinstance(raw, dict):
        return (_condition(raw, ()),)
    if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        return tuple(_condition(item, (i,)) for i, item in enumerate(raw))
    return (Condition(None, tuple(raw) if isinstance(raw, list) else raw),)


def _condition(raw: dict[str, Any], path: Path) -> Condition:
    value = raw["value"]
    return Condition(raw.get("filter"), tuple(value) if isinstance(value, list) else value, path)


def matches(pattern: str, name: str) -> bool:
    """Whether a filter matches a name: a glob where it has any of ``*?[``, else a substring."""
    if any(mark in pattern for mark in "*?["):
        return fnmatchcase(name, pattern)
    return pattern in name


def evaluate(setting: Setting, name: str, depth: float) -> Scalar:
    """The value for a tensor at a depth from 0 to 1, or :data:`UNSET`."""
    for condition in setting:
        if condition.matches(name):
            value = condition.value
            return at_depth(value, depth) if isinstance(value, tuple) else value
    unset: Scalar = UNSET
    return unset


def at_depth(gradient: tuple[Scalar, ...], depth: float) -> Scalar:
    """The gradient's value: between numbers a straight line, of other values the one whose step it is."""
    position = min(max(depth, 0.0), 1.0) * (len(gradient) - 1)
    below = int(position)
    numbers = [number for value in gradient if (number := _number(value)) is not None]
    if len(numbers) < len(gradient):
        return gradient[below]
    if position == below:
        return numbers[below]
    fraction = position - below
    return (1.0 - fraction) * numbers[below] + fraction * numbers[below + 1]


def _number(value: Scalar) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)  # also text: YAML 1.1 reads 1e-5 as text
    except (ValueError, OverflowError):
        return None


def constant(setting: Setting) -> bool:
    """Whether every tensor gets the same value."""
    return setting[0].everywhere and not isinstance(setting[0].value, tuple)


def scalars(raw: Any, path: Path = ()) -> list[tuple[Path, Scalar]]:
    """Every value that plain setting data holds, with its path in the data."""
    if isinstance(raw, dict):
        return scalars(raw["value"], (*path, "value"))
    if isinstance(raw, list):
        return [found for i, item in enumerate(raw) for found in scalars(item, (*path, i))]
    return [(path, raw)]
