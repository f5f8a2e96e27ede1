"""A job whose method solves a whole matrix: its sources and their Gram matrices are read one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

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

if TYPE_CHECKING:
    import torch

Matrix = NDArray[np.float64]


class _Lazy(Sequence["torch.Tensor"]):
    """Matrices that are made when they are asked for, so that one is held at a time."""

    def __init__(self, count: int, make: Callable[[int], torch.Tensor]) -> None:
        self._count = count
        self._make = make

    @overload
    def __getitem__(self, place: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[torch.Tensor]: ...
    def __getitem__(self, place: Any) -> Any:
        return self._make(place)

    def __len__(self) -> int:
        return self._count


def solve(
    plan: Plan, job: Job, fixed: Bound, sources: Sources, known: Known, sink: Sink, device: str
) -> dict[str, int]:
    """Make a tensor by a method of reach ``matrix``; how many of its weights are not finite, by source.

    Args:
        plan: the plan.
        job: one of its jobs.
        fixed: the method with its parameters.
        sources: the open files.
        known: the Gram matrices.
        sink: takes the result.
        device: where the matrix is solved, as torch names it.

    Raises:
        RunError: the method needs a Gram matrix that was not measured, or one of another size.
    """
    import torch

    (name,) = METHODS[job.method].facts
    bad: Counter[str] = Counter()
    count = len(job.reads)
    seen = _axis(known, job, name)
    axis = (len(job.shape) - 1 if seen is None else seen) % len(job.shape)

    def value(i: int) -> torch.Tensor:
        read = job.reads[i]
        raw = aligned(read.tensor.nbytes)
        (flat,) = sources.load([read], 0, job.size, [raw])
        wide = widen(flat, read.tensor.dtype.name).reshape(job.shape)
        if (wrong := int(np.count_nonzero(~np.isfinite(wide)))) > 0:
            bad[plan.sources[read.source].label] = wrong
        return torch.from_numpy(wide).to(device).movedim(axis, -1)

    def gram(i: int) -> torch.Tensor:
        if seen is None:  # what has seen no inputs counts all of them alike: the mean
            return torch.eye(job.shape[axis], dtype=torch.float64, device=device)
        found = known.matrix(job, name, i)
        if found is None or found.values.shape[-1] != job.shape[axis]:
            label = plan.sources[job.reads[i].source].label
            raise RunError(f"no Gram matrix of the inputs of `{job.name}` was measured", label, "see `mergetool facts`")
        return torch.from_numpy(np.ascontiguousarray(found.values)).to(device)

    arguments = {key: fixed.parameters[key] for key in fixed.parameters}
    solved = METHODS[job.method](_Lazy(count, value), _Lazy(count, gram), **arguments)
    result: Matrix = solved.movedim(-1, axis).cpu().numpy()
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
