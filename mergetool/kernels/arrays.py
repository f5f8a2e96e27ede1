"""The kernels of a coordinate text run on whole arrays: NumPy for the oracle's reading, and torch for any device.

Both compute in float64 like the compiled kernels, operation by operation, so the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import numpy as np

from mergetool.kernels import language
from mergetool.kernels.backend import BLOCK, THRESHOLDS, Array, Layout, Text
from mergetool.kernels.random import draws
from mergetool.kernels.rounding import OVERFLOW, narrow, widen
from mergetool.kernels.text import called


def bind(text: Text, names: dict[str, Any]) -> Text:
    """The same text with the language's names bound to something else, in its helper functions too."""
    assert isinstance(text, FunctionType)
    helpers = {name: bind(value, names) for name, value in called(text) if isinstance(value, FunctionType)}
    bound = FunctionType(
        text.__code__, {**text.__globals__, **helpers, **names}, text.__name__, text.__defaults__, text.__closure__
    )
    bound.__kwdefaults__ = text.__kwdefaults__
    return bound


class NumpyArrays:
    """Whole tiles in NumPy: the oracle's reading of a text."""

    names: dict[str, Any] = {name: getattr(language, name) for name in language.NAMES}  # noqa: RUF012 - constant

    matrices = "cpu"
    """Where whole matrices are solved."""

    def lane(self) -> AbstractContextManager[Any]:
        """What a worker's kernels run in."""
        return nullcontext()

    def load(self, raw: Array, dtype: str) -> Any:
        """A raw tile as float64."""
        return widen(raw, dtype)

    def store(self, values: Any, dtype: str, out: Array) -> Any:
        """Round into the raw tile ``out``; returns where the values are not finite there."""
        out[...] = narrow(np.broadcast_to(values, out.shape).astype(np.float64, copy=False), dtype)
        return ~(np.abs(values) < OVERFLOW[dtype])

    def infinite(self, values: Any) -> Any:
        """Where values are not finite."""
        return ~np.isfinite(values)

    def draws(self, key: int, start: int, stop: int) -> Any:
        """The random numbers of a run of coordinates."""
        return draws(key, start, stop)

    def block_sums(self, term: Any, size: int) -> Array:
        """The float64 sum of each block."""
        return np.array([np.sum(part) for part in np.split(np.broadcast_to(term, size), range(BLOCK, size, BLOCK))])

    def magnitude_bits(self, delta: Any) -> Array:
        """The float32 bit patterns of the magnitudes."""
        bits: Array = np.abs(delta).astype(np.float32).view(np.uint32)
        return bits

    def reaching(self, bits: Any, threshold: int) -> int:
        """How many magnitudes reach a threshold."""
        return int((bits >= threshold).sum())

    def gathered(self, bits: Any, low: int, high: int) -> Array:
        """The magnitudes in ``low <= bits < high``."""
        inside: Array = bits[(bits >= low) & (bits < high)]
        return inside

    def _given(self, tensors: tuple[str, ...], layout: Layout, start: int, inputs: Any, keys: Any) -> dict[str, Any]:
        count = len(layout.inputs)
        wide = [self.load(raw, dtype) for raw, dtype in zip(inputs[:count], layout.inputs, strict=True)]
        given: dict[str, Any] = {"base": wide[0], "value": tuple(wide[layout.base :]), "wide": wide}
        if "delta" in tensors:
            given["delta"] = tuple(v - wide[0] for v in given["value"])
        if "chance" in tensors:
            given["chance"] = tuple(self.draws(int(key), start, start + len(wide[0])) for key in keys)
        for n, name in enumerate(layout.extras):
            first = count + n * layout.sources
            given[name] = tuple(self.load(raw, "F32") for raw in inputs[first : first + layout.sources])
        return given

    def combine(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout
    ) -> Callable[..., int]:
        """As :meth:`mergetool.kernels.backend.Backend.combine`."""
        bound = bind(text, self.names)

        def run(start: int, inputs: Any, out: Array, keys: Any, *rest: Any) -> int:
            with np.errstate(all="ignore"), self.lane():
                given = self._given(tensors, layout, start, inputs, keys)
                named = dict(zip([t for t in tensors if t not in given and t != "delta"], rest, strict=False))
                values = rest[len(named) :]
                ordered = [named[t] if t in named else given[t] for t in tensors]
                result = bound(*ordered, **dict(zip(arguments, values, strict=True)))
                bad = self.store(result, layout.output, out)
                for w in given["wide"]:
                    bad = bad | self.infinite(w)
                return int(bad.sum())

        return run

    def sums(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, terms: int
    ) -> Callable[..., None]:
        """As :meth:`mergetool.kernels.backend.Backend.sums`."""
        bound = bind(text, self.names)

        def run(start: int, inputs: Any, partial: Array, keys: Any, *values: Any) -> None:
            with np.errstate(all="ignore"), self.lane():
                given = self._given(tensors, layout, start, inputs, keys)
                results = bound(*(given[t] for t in tensors), **dict(zip(arguments, values, strict=True)))
                for i, term in enumerate(results):
                    partial[:, i] = self.block_sums(term, len(inputs[0]))

        return run

    def _magnitudes(self, layout: Layout, inputs: Any) -> Iterator[tuple[int, Any]]:
        """The bits of each source's magnitudes."""
        wide = [self.load(raw, dtype) for raw, dtype in zip(inputs, layout.inputs, strict=True)]
        for i, value in enumerate(wide[1:]):
            with np.errstate(all="ignore"), self.lane():
                yield i, self.magnitude_bits(value - wide[0])

    def above(self, layout: Layout, count: int = THRESHOLDS) -> Callable[..., None]:
        """As :meth:`mergetool.kernels.backend.Backend.above`."""

        def run(inputs: Any, thresholds: Array, counts: Array) -> None:
            with self.lane():
                for i, bits in self._magnitudes(layout, inputs):
                    counts[i] += [self.reaching(bits, int(threshold)) for threshold in thresholds[i]]

        return run

    def between(self, layout: Layout) -> Callable[..., None]:
        """As :meth:`mergetool.kernels.backend.Backend.between`."""

        def run(inputs: Any, low: Array, high: Array, found: Array, used: Array) -> None:
            with self.lane():
                for i, bits in self._magnitudes(layout, inputs):
                    inside = self.gathered(bits, int(low[i]), int(high[i]))[: found.shape[1] - used[i]]
                    found[i, used[i] : used[i] + len(inside)] = inside
                    used[i] += len(inside)

        return run
