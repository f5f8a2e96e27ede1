"""What was measured, solved or trained ahead of the merge, as jobs see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mergetool.facts.correction import Edit
from mergetool.methods import METHODS
from mergetool.plan import Job


@dataclass(frozen=True)
class Extra:
    """Numbers that go with the weights of one source's tensor.

    Attributes:
        values: one for each place along ``axes``.
        axes: the axes of the tensor along which they differ, ascending; none for one number, all for one a weight.
        added: numbers along other axes that are added to these, neither of which are along all axes.
    """

    values: NDArray[Any]
    axes: tuple[int, ...]
    added: Extra | None = None

    def tile(self, shape: tuple[int, ...], start: int, stop: int) -> NDArray[np.float32]:
        """The numbers of a run of coordinates of a tensor of this shape."""
        if len(self.axes) == len(shape):
            return np.ascontiguousarray(self.values.reshape(-1)[start:stop], np.float32)
        last = max((-1, *self.axes, *(self.added.axes if self.added else ())))
        alike = prod(shape[last + 1 :])  # neighbours that have one number in common
        if self.added is None and len(self.axes) == last + 1:  # all axes up to the last
            first, until = start // alike, -(-stop // alike)
            edges = np.clip(np.arange(first, until + 1) * alike, start, stop)
            return np.repeat(np.asarray(self.values.reshape(-1)[first:until], np.float32), np.diff(edges))
        width = shape[last] * alike
        first, until = start // width, -(-stop // width)
        places = np.unravel_index(np.arange(first, until), shape[:last])
        made = np.empty((until - first, width), np.float32)
        own = self._lines(places, last, alike)
        if self.added is None:
            made[:] = own
        else:
            np.add(own, self.added._lines(places, last, alike), out=made)
        return made.reshape(-1)[start - first * width :][: stop - start]

    def _lines(self, places: tuple[NDArray[Any], ...], last: int, alike: int) -> NDArray[np.float32]:
        """The numbers of whole lines, the axes from ``last`` on, at these places before it; to be broadcast to them."""
        found = np.asarray(self.values[tuple(places[axis] for axis in self.axes if axis < last)], np.float32)
        return found.repeat(alike, axis=-1) if last in self.axes else found[..., None]


@dataclass(frozen=True)
class Gram:
    """The inner products of the inputs that a source's weight has seen, the mean over tokens.

    Attributes:
        values: float64 of shape [in, in], or [experts, in, in] for experts stacked in one tensor.
        axis: the axis of the weight that runs over its inputs.
    """

    values: NDArray[np.float64]
    axis: int


class Known(Protocol):
    """What is known about whole models when a job is worked on; ``source`` counts the job's sources, no base."""

    def extra(self, job: Job, name: str, source: int) -> Extra | None:
        """What the method's argument ``name`` is for a source; None where nothing is known of this tensor."""

    def matrix(self, job: Job, name: str, source: int) -> Gram | None:
        """The Gram matrix of a source's inputs; None where the tensor multiplies none."""

    def edit(self, job: Job) -> Edit | None:
        """What a correction makes of the result, before it is rounded; None where it stays as it is."""


class Nothing:
    """Nothing was measured: for recipes whose methods need no facts."""

    def extra(self, job: Job, name: str, source: int) -> Extra | None:
        """Nothing."""
        return None

    def matrix(self, job: Job, name: str, source: int) -> Gram | None:
        """Nothing."""
        return None

    def edit(self, job: Job) -> Edit | None:
        """Nothing."""
        return None


OTHERWISE: Mapping[str, Callable[[int], float]] = {
    "coefficients": lambda sources: 1 / sources,
    "squared_gradients": lambda sources: 1.0,
    "soup": lambda sources: 1.0,
}
"""The number that every weight of a tensor gets of which nothing is known: what makes the plain mean."""


def extra_tiles(known: Known, job: Job, sources: int, start: int, stop: int) -> tuple[NDArray[np.float32], ...]:
    """The tiles that a job's kernel takes besides its sources': for each fact one for each source."""
    tiles = []
    for name, kind in METHODS[job.method].facts.items():
        for source in range(sources):
            found = known.extra(job, name, source)
            found = found or Extra(np.array(OTHERWISE[kind](sources)), ())
            tiles.append(found.tile(job.shape, start, stop))
    return tuple(tiles)
