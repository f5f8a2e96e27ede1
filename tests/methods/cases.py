"""What the tests of methods share: parameters chosen from a declaration, data, and a merge by tiles."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracles
import torch
from backends import BACKENDS

from mergetool.kernels.backend import BLOCK, Layout
from mergetool.kernels.rounding import narrow, widen
from mergetool.methods import METHODS
from mergetool.methods.apply import bind, combiner, measure, portion
from mergetool.methods.declare import Method

torch.set_num_threads(1)  # tiles are small, and other tests run beside these

STORAGE = {"F64": np.float64, "F32": np.float32, "BF16": np.uint16, "F16": np.uint16}
SOURCES = 3
"""As many as tests merge where a method has no fixed number, so that they share compiled kernels."""


def sources_of(method: Method, wanted: int = SOURCES) -> int:
    """As many sources as wanted, or the nearest number that the method takes."""
    return min(max(wanted, method.fewest), method.most or wanted)


# Parameters ---------------------------------------------------------------------------------------------


def _number(parameter, share):
    """A number of the parameter, its share of the way through its range."""
    if parameter.low is None or parameter.high is None:
        return 0.3 + share
    return parameter.low + (parameter.high - parameter.low) * (0.25 + share / 2)


def _other(parameter, count):
    """A value that is not the default; sources differ."""
    if parameter.type is bool:
        return not parameter.default
    if parameter.type is int:
        return 1 if parameter.default != 1 else 2
    if parameter.per_source:
        return tuple(_number(parameter, i / count) for i in range(count))
    return _number(parameter, 0.4)


def plainest(method: Method, count: int) -> dict[str, Any]:
    """The defaults, and weights that sum to one; anything else that is required is in the middle of its range."""
    values = {}
    for name, parameter in method.parameters.items():
        if name == "weight":
            values[name] = tuple((i + 1) / sum(range(1, count + 1)) for i in range(count))
        elif parameter.required:
            values[name] = _other(parameter, count)
        else:
            values[name] = (parameter.default,) * count if parameter.per_source else parameter.default
    return values


BARE = {name: method for name, method in METHODS.items() if not method.facts}
"""The methods that take tensors and parameters and nothing else."""


def variants(method: Method, count: int) -> list[dict[str, Any]]:
    """The plainest parameters; then all others changed, once for each choice of a parameter that has choices."""
    made = [plainest(method, count)]
    busy = {n: _other(p, count) for n, p in method.parameters.items() if not p.choices}
    chosen = [(n, choice) for n, p in method.parameters.items() for choice in p.choices]
    for name, choice in chosen or [(None, None)]:
        rest = {n: p.default for n, p in method.parameters.items() if p.choices}
        made.append({**rest, **busy, **({name: choice} if name else {})})
    if "weight" in method.parameters and count > 1:
        made.append({**made[-1], "weight": (-0.5, *busy["weight"][1:])})
    return made


def every_variant(wanted: int = SOURCES) -> list[tuple[Method, dict[str, Any]]]:
    """Each method of the catalogue that takes tensors alone, with each of its variants; see test_with_facts."""
    return [(m, values) for m in BARE.values() for values in variants(m, sources_of(m, wanted))]


# Data ---------------------------------------------------------------------------------------------------


def values_of(method: Method, size: int, seed: int = 0, distance: float = 1e-3, sources: int = SOURCES):
    """A base, where the method wants one, and sources near it that leave some of its entries alone: float64."""
    random = np.random.default_rng([size, seed])
    base = random.normal(scale=0.02, size=size)
    made = [
        base + random.normal(scale=distance, size=size) * (random.random(size) < 0.7)
        for _ in range(sources_of(method, sources))
    ]
    return [base, *made] if method.base == "required" else made


def raw_of(values, dtypes):
    """Values as raw tiles of the dtypes, repeated as far as there are values."""
    names = tuple((dtypes * len(values))[: len(values)])
    return [narrow(v, name) for v, name in zip(values, names, strict=True)], names


# Merging ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One merge of one tensor."""

    method: Method
    parameters: dict[str, Any]
    raw: list[np.ndarray]
    dtypes: tuple[str, ...]
    output: str = "F32"
    labels: tuple[str, ...] = ()
    seed: int = 5
    name: str = "model.layers.0.mlp.up_proj.weight"

    @property
    def base(self) -> int:
        """1 where the first tile is the base."""
        return int(self.method.base == "required")

    @property
    def layout(self) -> Layout:
        return Layout(bool(self.base), self.dtypes, self.output)

    @property
    def bound(self):
        labels = self.labels or tuple(f"source {i}" for i in range(len(self.raw) - self.base))
        return bind(self.method, self.parameters, self.seed, labels, self.name)

    @property
    def wide(self) -> list[np.ndarray]:
        """The inputs in float64."""
        return [widen(raw, dtype) for raw, dtype in zip(self.raw, self.dtypes, strict=True)]

    def permuted(self, order) -> "Case":
        """The same sources in another order, each with its label and its own parameters."""
        per_source = {n for n, p in self.method.parameters.items() if p.per_source}
        parameters = {n: tuple(v[i] for i in order) if n in per_source else v for n, v in self.parameters.items()}
        labels = tuple(f"source {i}" for i in order)
        first = self.raw[: self.base]
        raw = [*first, *(self.raw[self.base + i] for i in order)]
        return replace(self, parameters=parameters, labels=labels, raw=raw)


def make(method: Method, parameters, size, dtypes=("F32",), output="F32", **data) -> Case:
    """A case on made-up data."""
    raw, names = raw_of(values_of(method, size, **data), dtypes)
    return Case(method, parameters, raw, names, output)


def merge(case: Case, backend: str = "compiled", tile: int | None = None):
    """Measure and combine by tiles, the last tile first; returns the raw result and how much is not finite."""
    place = BACKENDS[backend]
    size = len(case.raw[0])
    tile = tile or max(size, 1)
    assert tile % BLOCK == 0 or tile >= size
    starts = range(0, size, tile)[::-1]

    def visit(do, share=1.0):
        for start in starts:
            stop = start + portion(min(tile, size - start), share)
            yield start, do(start, tuple(raw[start:stop] for raw in case.raw))

    measured = measure(case.bound, case.layout, size, visit, place)
    combine = combiner(case.bound, case.layout, measured, place)
    out = np.empty(size, STORAGE[case.output])
    bad = 0
    for start in starts:
        bad += combine(start, tuple(raw[start : start + tile] for raw in case.raw), out[start : start + tile])
    return out, bad


# Comparing ----------------------------------------------------------------------------------------------


def ulps(a, b) -> int:
    """How many float32 numbers lie between two arrays, at most."""
    ordered = [np.where(x.view(np.int32) < 0, -(x.view(np.int32) & 0x7FFFFFFF), x.view(np.int32)) for x in (a, b)]
    return int(np.abs(ordered[0].astype(np.int64) - ordered[1].astype(np.int64)).max(initial=0))


def bits(array):
    """The bit patterns of raw storage."""
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


ROUND = {"F32": oracles.round_to_float32, "BF16": oracles.round_to_bfloat16, "F16": oracles.round_to_float16}
TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
