"""How a method is declared: a pure function whose signature says what it needs.

Before the star stand tensors, after the star stand parameters::

    @method(title="TIES", paper="arXiv:2306.01708", citation="...", base="required", measures={"cut": Cut()})
    def ties(base, delta, cut, *, weight: PerSource[float] = REQUIRED, normalize: bool = True): ...

Tensors are, for one coordinate: ``base``; ``value[i]`` or ``delta[i]`` (value minus base) of source *i*; ``chance[i]``,
a random number in [0, 1); and the method's measures by name, one number for each source.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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


@dataclass(frozen=True)
class Sums:
    """A measure made of sums over the tensor: ``finish`` turns them into one number for each source.

    ``terms`` is a coordinate text like a method's; it returns a tuple of numbers to be summed in float64.
    ``finish(sums, **parameters)`` gets the sums in the same order. ``needed(**parameters)`` may say that the
    result does not depend on the sums, so that the pass is left out and ``finish`` gets ``None``.
    """

    terms: Callable[..., Any]
    finish: Callable[..., tuple[float, ...]]
    needed: Callable[..., bool] = field(default=lambda **parameters: True)


@dataclass(frozen=True)
class Cut:
    """A measure: the magnitude below which a source's delta is trimmed, so that ``density`` of it is kept.

    Magnitudes are compared as float32. The cut is the k-th largest of them, k = max(1, int(density · n)), over the
    tensor or over the model as the parameter ``scope`` says; coordinates *at* the cut are kept, ties and all.
    Density 1 keeps everything without looking; density 0 keeps nothing.
    """

    density: str = "density"
    scope: str = "scope"


Measure = Sums | Cut
Check = Callable[..., "list[tuple[str, str]]"]


@dataclass(frozen=True)
class Method:
    """A merge method: the pure function and everything that follows from its declaration."""

    name: str
    title: str
    paper: str
    citation: str
    function: Callable[..., Any]
    reach: Literal["coordinate", "row", "matrix"]
    base: Literal["required", "optional", "ignored"]
    """``required``: deltas are taken from it; ``ignored``: it only lends its config and tokenizer."""
    fewest: int
    """The fewest sources, the base not counted where it is required."""
    most: int | None
    parameters: Mapping[str, Parameter]
    measures: Mapping[str, Measure]
    facts: Mapping[str, str]
    """What must be known of the models besides: argument → kind of fact. One for each weight of each source, or a
    matrix for each source where the reach is ``matrix``."""
    tensors: tuple[str, ...]
    """The function's arguments before the star."""
    checks: Check
    differs: str
    """Where the method differs on purpose from its paper or from mergekit."""

    @property
    def summary(self) -> str:
        """The first line of the docstring: what the method does, in plain words."""
        return inspect.getdoc(self.function).split("\n")[0]  # type: ignore[union-attr]

    @property
    def text(self) -> str:
        """The whole docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def random(self) -> bool:
        """Whether the method draws random numbers."""
        return "chance" in self.tensors

    def check(self, values: Mapping[str, Any]) -> list[tuple[str, str]]:
        """What is wrong with parameters that are each right: pairs of parameter name and message."""
        return self.checks(**values)

    def __call__(self, *tensors: Any, **parameters: Any) -> Any:
        """Apply the text to whatever the tensors are: floats or float64 arrays."""
        return self.function(*tensors, **parameters)


def _no_checks(**values: Any) -> list[tuple[str, str]]:
    return []


def _parameter(argument: str, hint: Any, default: Any) -> Parameter:
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


def method(
    *,
    title: str,
    paper: str,
    citation: str,
    base: Literal["required", "optional", "ignored"],
    fewest: int = 1,
    most: int | None = None,
    measures: Mapping[str, Measure] | None = None,
    facts: Mapping[str, str] | None = None,
    checks: Check = _no_checks,
    differs: str = "",
    reach: Literal["coordinate", "row", "matrix"] = "coordinate",
) -> Callable[[Callable[..., Any]], Method]:
    """Declare a function as a merge method; its name is the recipe's ``merge_method``.

    Args:
        title: the name in the field, as in its paper.
        paper: an identifier such as ``arXiv:2306.01708``, or a URL.
        citation: authors, title and venue, one line.
        base: what the base model is to the method.
        fewest: the fewest sources besides a required base.
        most: the most sources besides a required base.
        measures: what the function must know about the whole tensor or model, by argument name.
        facts: what is measured on data or trained ahead of the merge, by argument name.
        checks: given all resolved parameters by argument name, says what does not go together.
        differs: where the method differs on purpose from its paper or from mergekit.
        reach: what of each source one result depends on.
    """

    def declare(function: Callable[..., Any]) -> Method:
        hints = get_type_hints(function, include_extras=True)
        arguments = inspect.signature(function).parameters.values()
        parameters = [_parameter(a.name, hints[a.name], a.default) for a in arguments if a.kind is a.KEYWORD_ONLY]
        return Method(
            name=function.__name__,
            title=title,
            paper=paper,
            citation=citation,
            function=function,
            reach=reach,
            base=base,
            fewest=fewest,
            most=most,
            parameters={p.name: p for p in parameters},
            measures=dict(measures or {}),
            facts=dict(facts or {}),
            tensors=tuple(a.name for a in arguments if a.kind is not a.KEYWORD_ONLY),
            checks=checks,
            differs=differs,
        )

    return declare
