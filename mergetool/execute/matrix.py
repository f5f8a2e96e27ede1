"""A job whose method solves a whole matrix: its sources and their Gram matrices are read one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import RunError
from mergetool.execute.buffers import aligned, typed
from mergetool.execute.known import Known
from mergetool.execute.outlet import Sink
from mergetool.execute.tiles import Sources
from mergetool.kernels.rounding import OVERFLOW, narrow, widen
from mergetool.methods import METHODS
from mergetool.methods.apply import Bound
from mergetool.plan import Job, Plan

Matrix = NDArray[np.float64]


class _Lazy(Sequence[Matrix]):
    """Matrices that are made when they are asked for, so that one is held at a time."""

    def __init__(self, count: int, make: Callable[[int], Matrix]) -> None:
        self._count = count
        self._make = make

    @overload
    def __getitem__(self, place: int) -> Matrix: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Matrix]: ...
    def __getitem__(self, place: Any) -> Any:
        return self._make(place)

    def __len__(self) -> int:
        return self._count


def solve(plan: Plan, job: Job, fixed: Bound, sources: Sources, known: Known, sink: Sink) -> dict[str, int]:
    """Make a tensor by a method of reach ``matrix``; how many of its weights are not finite, by source.

    Raises:
        RunError: the method needs a Gram matrix that was not measured, or one of another size.
    """
    (name,) = METHODS[job.method].facts
    bad: Counter[str] = Counter()
    count = len(job.reads)
    seen = _axis(known, job, name)
    axis = (len(job.shape) - 1 if seen is None else seen) % len(job.shape)

    def value(i: int) -> Matrix:
        read = job.reads[i]
        raw = aligned(read.tensor.nbytes)
        (flat,) = sources.load([read], 0, job.size, [raw])
        wide = widen(flat, read.tensor.dtype.name).reshape(job.shape)
        if (wrong := int(np.count_nonzero(~np.isfinite(wide)))) > 0:
            bad[plan.sources[read.source].label] = wrong
        return np.moveaxis(wide, axis, -1)

    def gram(i: int) -> Matrix:
        if seen is None:  # what has seen no inputs counts all of them alike: the mean
            return np.eye(job.shape[axis])
        found = known.matrix(job, name, i)
        if found is None or found.values.shape[-1] != job.shape[axis]:
            label = plan.sources[job.reads[i].source].label
            raise RunError(f"no Gram matrix of the inputs of `{job.name}` was measured", label, "see `mergetool facts`")
        return found.values

    arguments = {key: fixed.parameters[key] for key in fixed.parameters}
    result = np.moveaxis(METHODS[job.method](_Lazy(count, value), _Lazy(count, gram), **arguments), -1, axis)
    if (edit := known.edit(job)) is not None:
        result = edit(result)
    if not bad:
        bad["result"] = int(np.count_nonzero(~(np.abs(result) < OVERFLOW[job.dtype.name])))
    _write(np.ascontiguousarray(result).reshape(-1), plan.memory.tile, job, sink)
    return dict(+bad)


def _axis(known: Known, job: Job, name: str) -> int | None:
    """The axis of the inputs; None where none were seen. The matrices are made again when they are asked for."""
    for i in range(len(job.reads)):
        if (found := known.matrix(job, name, i)) is not None:
            return found.axis
    return None


def _write(result: Matrix, tile: int, job: Job, sink: Sink) -> None:
    width = job.dtype.storage.itemsize
    for start in range(0, job.size, tile):
        piece = result[start : start + tile]
        raw = sink.take(start * width, piece.size * width)
        typed(raw, job.dtype.storage)[...] = narrow(piece, job.dtype.name)
        sink.put(start * width, raw)
