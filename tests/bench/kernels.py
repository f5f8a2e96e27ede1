"""Nanoseconds for an element of a source on one core: every coordinate method, and the kernels that measures use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from mergetool.execute.buffers import Bytes, aligned, typed
from mergetool.facts.magnitude import LARGEST_GATHER
from mergetool.kernels.backend import THRESHOLDS, Array, Backend, Layout, blocks, compiled
from mergetool.kernels.rounding import narrow, widen
from mergetool.kernels.text import positional_arguments
from mergetool.methods import METHODS, Method
from mergetool.methods.apply import Bound, bind, combiner
from mergetool.methods.apply import measure as measured
from mergetool.methods.declare import REQUIRED, Parameter, Sums
from mergetool.plan.memory import LARGEST_TILE
from mergetool.storage.dtypes import dtype

from .markdown import number, table
from .work import Bench

REPEATS = 51
DTYPES = ("BF16", "F32")
SOURCES = (2, 8)
MOST = 2.0
"""Nanoseconds above which a kernel is marked."""
KEPT = 0.3
"""The density of what is trimmed or dropped."""
Timed = Callable[[], object]
"""One call of a kernel over one tile."""


@dataclass(frozen=True)
class Place:
    """Where kernels are timed."""

    backend: Backend = field(default_factory=compiled)
    allocate: Callable[[int], Bytes] = aligned
    """Makes the buffers that tiles lie in."""


def inputs(kind: str, count: int, place: Place) -> tuple[Array, ...]:
    """A tile of a base and of ``count`` fine-tunes of it, half of whose coordinates are the base's."""
    tiles = []
    for source in range(count + 1):
        raw = _weights(kind, source)
        tile = typed(place.allocate(raw.nbytes), dtype(kind).storage)
        tile[...] = raw
        tiles.append(tile)
    return tuple(tiles)


@cache
def _weights(kind: str, source: int) -> Array:
    """The weights of the base, which is source 0, or of a fine-tune of it."""
    base = np.random.default_rng(0).standard_normal(LARGEST_TILE) * 0.02
    rng = np.random.default_rng([1, source])
    delta = rng.standard_normal(LARGEST_TILE) * 0.001 * (rng.random(LARGEST_TILE) < 0.5) * (source > 0)
    return narrow(base + delta, kind)


def chosen(method: Method, count: int, choices: Mapping[str, Any]) -> Bound:
    """A method with parameters that make it do all of its work."""

    def value(parameter: Parameter) -> Any:
        if parameter.name in choices:
            return choices[parameter.name]
        if parameter.name == "density":
            return (KEPT,) * count if parameter.per_source else KEPT
        if parameter.default is not REQUIRED and not parameter.per_source:
            return parameter.default
        one = parameter.choices[0] if parameter.choices else parameter.type(0.5 if parameter.type is float else 1)
        return (one,) * count if parameter.per_source else one

    parameters = {name: value(parameter) for name, parameter in method.parameters.items()}
    return bind(method, parameters, 0, [str(i) for i in range(count)], "weight")


def combining(method: Method, count: int, kind: str, place: Place) -> Timed:
    """A call of a method's kernel on one tile, its measures known."""
    based = method.base == "required"
    tiles = inputs(kind, count, place)[not based :]
    extras = [np.random.default_rng(i).random(LARGEST_TILE, np.float32) for i in range(count * len(method.facts))]
    layout = Layout(based, (kind,) * len(tiles), kind, tuple(method.facts))
    bound = chosen(method, count, {})
    known = measured(bound, layout, LARGEST_TILE, lambda do, share=1.0: [(0, do(0, tiles))], place.backend)
    kernel = combiner(bound, layout, known, place.backend)
    out = typed(place.allocate(tiles[0].nbytes), dtype(kind).storage)
    return lambda: kernel(0, (*tiles, *extras), out)


def summing(method: Method, wanted: Sums, count: int, kind: str, place: Place) -> Timed:
    """A call of the kernel of a measure that is made of sums."""
    based = method.base == "required"
    tiles = inputs(kind, count, place)[not based :]
    bound = chosen(method, count, {})
    names, values = bound.numbers(wanted.terms)
    tensors = positional_arguments(wanted.terms)
    zeros: list[Any] = [0.0 if tensor == "base" else (0.0,) * count for tensor in tensors]
    terms = len(wanted.terms(*zeros, **dict(zip(names, values, strict=True))))
    kernel = place.backend.sums(wanted.terms, tensors, names, Layout(based, (kind,) * len(tiles)), terms)
    table_of_sums = np.zeros((blocks(LARGEST_TILE), terms))
    return lambda: kernel(0, tiles, table_of_sums, bound.key_words, *values)


def looking(which: str, count: int, kind: str, place: Place) -> Timed:
    """A call of `above`, thresholds around a cut, or of `between`, few magnitudes inside."""
    tiles = inputs(kind, count, place)
    layout = Layout(True, (kind,) * len(tiles))
    wide = [widen(tile, kind) for tile in tiles]
    ranked = [np.sort(np.abs(value - wide[0]).astype(np.float32).view(np.uint32))[::-1] for value in wide[1:]]
    cut = int(KEPT * LARGEST_TILE)
    if which == "above":
        near = [cut + LARGEST_TILE * step // 1000 for step in range(THRESHOLDS)]
        thresholds, counts = np.array([row[near] for row in ranked]), np.zeros((count, THRESHOLDS), np.int64)
        kernel = place.backend.above(layout)
        return lambda: kernel(tiles, thresholds, counts)
    low, high = (np.array([row[place] for row in ranked]) for place in (cut, cut - (LARGEST_TILE >> 10)))
    found, used = np.empty((count, LARGEST_GATHER), np.uint32), np.zeros(count, np.int64)
    kernel = place.backend.between(layout)

    def gather() -> None:
        used[:] = 0
        kernel(tiles, low, high, found, used)

    return gather


def kernels() -> Iterator[tuple[str, int | None, Callable[[int, str, Place], Timed]]]:
    """Every kernel: its name, the most sources it takes, and what makes a call for a number, a dtype and a place."""
    seen: set[int] = set()
    for name, method in METHODS.items():
        if method.reach != "coordinate":
            continue
        yield name, method.most, partial(combining, method)
        for wanted in method.measures.values():
            if isinstance(wanted, Sums) and id(wanted) not in seen:
                seen.add(id(wanted))  # several methods share one
                yield f"sums: {name}", method.most, partial(summing, method, wanted)
    for which in ("above", "between"):
        yield which, None, partial(looking, which)


def timed(call: Timed, elements: int) -> dict[str, float]:
    """Nanoseconds for an element: the median of many calls, the least and the most."""
    for _ in range(3):
        call()
    took = []
    for _ in range(REPEATS):
        began = time.thread_time_ns()  # not the clock on the wall: others may take the core meanwhile
        call()
        took.append((time.thread_time_ns() - began) / elements)
    return {"median": statistics.median(took), "least": min(took), "most": max(took)}


def measure(bench: Bench) -> dict[str, Any]:
    """Time every kernel over one tile, again and again."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    here = Place()
    for name, most, make in kernels():
        for kind, count in product(DTYPES, sorted({min(count, most or count) for count in SOURCES})):
            took = timed(make(count, kind, here), LARGEST_TILE * count)
            found.setdefault(name, {})[column(kind, count)] = took
            print(f"{name:24} {column(kind, count):16} {took['median']:.3f} ns", flush=True)
    return {"settings": {"tile": LARGEST_TILE, "calls": REPEATS, "density": KEPT}, "ns": found}


def column(kind: str, count: int) -> str:
    """What a number is of."""
    return f"{kind.lower()} × {count}"


def nanoseconds(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Nanoseconds by kernel, those above the mark in bold."""
    columns = [column(kind, count) for kind, count in product(DTYPES, (1, *SOURCES))]

    def cell(took: Mapping[str, float] | None) -> str:
        shown = number(took["median"] if took else None)
        return f"**{shown}**" if took and took["median"] > MOST else shown

    return table(["kernel", *columns], [[f"`{k}`", *(cell(row.get(c)) for c in columns)] for k, row in found.items()])


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    settings, found = results["settings"], results["ns"]
    slow = sum(took["median"] > MOST for row in found.values() for took in row.values())
    said = (
        "Nanoseconds for an element of a source, processor time of one thread: medians of "
        f"{settings['calls']} calls over a tile of {settings['tile']} elements, whose buffers are used again. Columns "
        "are the sources' dtype and number; a base that deltas are taken from is read besides and not counted. "
        f"Above {MOST:g} ns, in bold: {slow or 'none'}."
    )
    return f"{said}\n\n{nanoseconds(found)}"
