"""A parameter of a method: its type and bounds as the signature says them, and what is refused of a value."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

T = TypeVar("T")
PerSource = tuple[T, ...]


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()
"""The default of a parameter that has none."""


@dataclass(frozen=True)
class Doc:
    """What a parameter means, in one sentence; the only place where it is said."""

    text: str


@dataclass(frozen=True)
class Bounds:
    """The inclusive range of a number."""

    low: float | None = None
    high: float | None = None


Fraction = Annotated[float, Bounds(0.0, 1.0)]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as recipes write it."""

    name: str
    """Its name in recipes: the argument's, without the underscore that keeps it apart from a Python keyword."""
    argument: str
    type: type
    per_source: bool
    """Whether every source has its own value."""
    default: Any
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def required(self) -> bool:
        """Whether a recipe has to set it."""
        return self.default is REQUIRED

    @property
    def kind(self) -> str:
        """Its type in words, for messages and tables."""
        if self.choices:
            return " | ".join(str(c).lower() if isinstance(c, bool) else str(c) for c in self.choices)
        words = {float: "number", int: "integer", bool: "true | false", str: "text"}[self.type]
        span = {(0.0, 1.0): " from 0 to 1"}.get((self.low, self.high), "")  # type: ignore[arg-type]
        return words + span

    def check(self, value: Any) -> Any:
        """Return the value in the parameter's type.

        Raises:
            ValueError: with the end of a sentence, such as ``must be from 0 to 1, not 1.5``.
        """
        if self.choices:
            for choice in self.choices:
                if type(choice) is type(value) and choice == value:
                    return choice
            near = difflib.get_close_matches(str(value), [str(c) for c in self.choices], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            one = "one of " if len(self.choices) > 1 else ""
            raise ValueError(f"must be {one}{self.kind.replace(' | ', ', ')}, not {_show(value)}{hint}")
        if self.type is float:
            value = self._number(value)
        elif type(value) is not self.type:
            raise ValueError(f"must be {self.kind.replace(' | ', ' or ')}, not {_show(value)}")
        below = self.low is not None and value < self.low
        above = self.high is not None and value > self.high
        if below or above:
            raise ValueError(f"must be {_range(self.low, self.high)}, not {_show(value)}")
        return value

    def advice(self, value: Any) -> str:
        """What to write instead of a value that :meth:`check` refuses; empty where the refusal says it."""
        if len(self.choices) == 1:
            return self.description
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.type is float and not self.choices and not number:
            return f"write a number, such as `{self.name}: 0.5`"
        return ""

    @staticmethod
    def _number(value: Any) -> float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"must be a number, not {_show(value)}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be a number, not {_show(value)}")
        try:
            number = float(value)
        except OverflowError:
            raise ValueError("must be a finite number, not an integer beyond float64") from None
        if not math.isfinite(number):
            raise ValueError(f"must be a finite number, not {number}")
        return number


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return f"at least {low:g}"
    if low is None:
        return f"at most {high:g}"
    return f"from {low:g} to {high:g}"


def parameter_of(argument: str, hint: Any, default: Any) -> Parameter:
    """The parameter that an argument behind the star declares.

    Args:
        argument: its name.
        hint: its annotation.
        default: its default; :data:`REQUIRED` where it has none.
    """
    description, bounds = "", Bounds()
    per_source = False
    while get_origin(hint) in (Annotated, tuple):
        if get_origin(hint) is tuple:
            per_source, hint = True, get_args(hint)[0]
            continue
        hint, *notes = get_args(hint)
        for note in notes:
            description = note.text if isinstance(note, Doc) else description
            bounds = note if isinstance(note, Bounds) else bounds
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else hint
    assert kind in (float, int, bool, str), f"{argument}: {hint} is no type of parameter"
    assert description, f"{argument} needs a Doc"
    name = argument.rstrip("_")
    return Parameter(name, argument, kind, per_source, default, description, bounds.low, bounds.high, choices)
