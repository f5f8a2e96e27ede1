"""A method applied to tiles: measure what it must know, then combine; the same steps in memory and streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from mergetool.facts import magnitude
from mergetool.kernels import random
from mergetool.kernels.backend import Array, Backend, Layout, blocks
from mergetool.kernels.text import keyword_arguments, positional_arguments
from mergetool.methods.declare import Cut, Method, Sums

R = TypeVar("R")
Inputs = tuple[Array, ...]


class Visit(Protocol):
    """Goes over all tiles of a tensor, calls ``do(start, inputs)`` on each, and returns the results in any order.

    Tiles start at multiples of :data:`mergetool.kernels.backend.BLOCK`; results come with their start. With a
    ``share`` below 1 only about so much of each tile is looked at, from its start on.
    """

    def __call__(self, do: Callable[[int, Inputs], R], share: float = 1.0) -> Iterable[tuple[int, R]]:
        """Call ``do`` on every tile."""


def portion(length: int, share: float) -> int:
    """How much of a tile is looked at: a share of it, in whole runs of 64."""
    return min(length, -(-math.ceil(length * share) // 64) * 64)


@dataclass(frozen=True)
class Bound:
    """A method with the parameters and random keys of one tensor."""

    method: Method
    parameters: Mapping[str, Any]
    """By argument name; a tuple with one value for each source where the parameter is per source."""
    keys: tuple[int, ...]
    """The random key of each source."""

    def numbers(self, text: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """The parameters that a coordinate text uses: names and values; choices never reach it."""
        chosen = {p.argument for p in self.method.parameters.values() if p.choices}
        names = tuple(name for name in keyword_arguments(text) if name not in chosen)
        return names, tuple(self.parameters[name] for name in names)

    @property
    def key_words(self) -> tuple[np.uint64, ...]:
        """The keys as the kernels take them."""
        return tuple(np.uint64(key) for key in self.keys)


def bind(method: Method, parameters: Mapping[str, Any], seed: int, sources: Sequence[str], tensor: str) -> Bound:
    """Fix a method's parameters for one tensor.

    Args:
        method: the method.
        parameters: every parameter by recipe name, per-source ones as tuples.
        seed: the recipe's seed.
        sources: the sources' labels as the recipe writes them, the base not included.
        tensor: the tensor's name.
    """
    named = {method.parameters[name].argument: value for name, value in parameters.items()}
    keys = tuple(random.key(seed, source, tensor) for source in sources) if method.random else (0,) * len(sources)
    return Bound(method, named, keys)


def looks(bound: Bound, facts: Sequence[str] = ()) -> bool:
    """Whether the method has to go over the tensor before it can combine; not for measures that are ``facts``."""
    for name, wanted in bound.method.measures.items():
        if name in facts:
            continue
        if isinstance(wanted, Cut):
            if not all(magnitude.trivial(density) for density in bound.parameters[wanted.density]):
                return True
        elif wanted.needed(**bound.parameters):
            return True
    return False


@dataclass(frozen=True)
class Deltas:
    """The magnitudes of a tensor's deltas; a :class:`mergetool.facts.magnitude.Look`."""

    visit: Visit
    layout: Layout
    backend: Backend

    def sample(self, share: float) -> list[Array]:
        """About a share of each source's magnitudes."""
        low, high = np.zeros(self.layout.sources, np.uint32), np.full(self.layout.sources, 0xFFFFFFFF, np.uint32)
        return self._gathered(low, high, share)

    def above(self, thresholds: Array) -> Array:
        """How many magnitudes of each source reach each threshold."""
        kernel = self.backend.above(self.layout, thresholds.shape[1])

        def count(start: int, inputs: Inputs) -> Array:
            counts = np.zeros(thresholds.shape, np.int64)
            kernel(inputs, thresholds, counts)
            return counts

        return sum((counts for _, counts in self.visit(count)), np.zeros(thresholds.shape, np.int64))

    def between(self, low: Array, high: Array) -> list[Array]:
        """Each source's magnitudes in a range."""
        return self._gathered(low, high, 1.0)

    def _gathered(self, low: Array, high: Array, share: float) -> list[Array]:
        kernel = self.backend.between(self.layout)

        def gather(start: int, inputs: Inputs) -> list[Array]:
            found = np.empty((self.layout.sources, min(len(inputs[0]), magnitude.LARGEST_GATHER)), np.uint32)
            used = np.zeros(self.layout.sources, np.int64)
            kernel(inputs, low, high, found, used)
            return [row[:count].copy() for row, count in zip(found, used, strict=True)]

        parts = [rows for _, rows in self.visit(gather, share)]
        none = np.empty(0, np.uint32)
        return [np.concatenate([none, *(rows[i] for rows in parts)]) for i in range(self.layout.sources)]


def _sums(measure: Sums, bound: Bound, layout: Layout, visit: Visit, backend: Backend) -> tuple[float, ...]:
    names, values = bound.numbers(measure.terms)
    tensors = positional_arguments(measure.terms)
    terms = _term_count(measure.terms, tensors, names, values, layout.sources)
    kernel = backend.sums(measure.terms, tensors, names, Layout(layout.base, layout.inputs), terms)

    def add(start: int, inputs: Inputs) -> Array:
        partial = np.zeros((blocks(len(inputs[0])), terms))
        kernel(start, inputs, partial, bound.key_words, *values)
        return partial

    tables = [partial for _, partial in visit(add)]
    columns = np.concatenate(tables) if tables else np.zeros((0, terms))
    return tuple(_exact_sum(columns[:, i]) for i in range(terms))  # exact, so the order of tiles does not matter


def _exact_sum(column: Array) -> float:
    try:
        return math.fsum(column)
    except (OverflowError, ValueError):  # beyond float64, or infinities of both signs: what follows is not finite
        return math.nan


def _term_count(
    terms: Callable[..., Any], tensors: tuple[str, ...], names: tuple[str, ...], values: Any, sources: int
) -> int:
    zeros: list[Any] = [0.0 if t == "base" else (0.0,) * sources for t in tensors]
    return len(terms(*zeros, **dict(zip(names, values, strict=True))))


def measure(
    bound: Bound,
    layout: Layout,
    size: int,
    visit: Visit,
    backend: Backend,
    facts: Mapping[str, tuple[float, ...]] | None = None,
) -> tuple[tuple[float, ...], ...]:
    """What the method must know about the whole tensor: for each of its measures, one number for each source.

    Args:
        bound: the method and its parameters.
        layout: the dtypes of the tiles.
        size: the tensor's number of elements.
        visit: goes over the tiles; not called when nothing has to be looked at.
        backend: where the kernels run.
        facts: measures known already, because their scope is the model.
    """
    found: list[tuple[float, ...]] = []
    for name, wanted in bound.method.measures.items():
        if facts and name in facts:
            found.append(facts[name])
        elif isinstance(wanted, Cut):
            densities = bound.parameters[wanted.density]
            found.append(magnitude.cuts(densities, size, Deltas(visit, layout, backend)))
        else:
            needed = wanted.needed(**bound.parameters)
            sums = _sums(wanted, bound, layout, visit, backend) if needed else None
            found.append(wanted.finish(sums, **bound.parameters))
    return tuple(found)


def combiner(
    bound: Bound, layout: Layout, measured: tuple[tuple[float, ...], ...], backend: Backend
) -> Callable[[int, Inputs, Array], int]:
    """Make ``combine(start, inputs, out) -> non-finite``, which fills one raw tile of the result."""
    text = bound.method.function
    names, values = bound.numbers(text)
    kernel = backend.combine(text, bound.method.tensors, names, layout)
    keys = bound.key_words

    def combine(start: int, inputs: Inputs, out: Array) -> int:
        return kernel(start, inputs, out, keys, *measured, *values)

    return combine
