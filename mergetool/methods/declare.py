"""How a method is declared: a pure function whose signature says what it needs.

Before the star stand tensors, after the star stand parameters::

    @method(title="TIES", paper="arXiv:2306.01708", citation="...", base="required", measures={"cut": Cut()})
    def ties(base, delta, cut, *, weight: PerSource[float] = REQUIRED, normalize: bool = True): ...

Tensors are, for one coordinate: ``base``; ``value[i]`` or ``delta[i]`` (value minus base) of source *i*; ``chance[i]``,
a random number in [0, 1); and the method's measures by name, one number for each source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from mergetool.methods.parameter import REQUIRED, Bounds, Doc, Fraction, Parameter, PerSource, parameter_of

__all__ = [
    "REQUIRED",
    "Bounds",
    "Cut",
    "Doc",
    "Fraction",
    "Measure",
    "Method",
    "Parameter",
    "PerSource",
    "Sums",
    "method",
]


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
        parameters = [parameter_of(a.name, hints[a.name], a.default) for a in arguments if a.kind is a.KEYWORD_ONLY]
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
