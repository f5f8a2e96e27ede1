"""Turned tensors without a rewritten copy: any run of their coordinates, read where it lies in the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import Turning, turned_array
from mergetool.errors import CheckpointError, NonFinite, RunError
from mergetool.storage.header import Entry
from mergetool.storage.reader import Reader

__all__ = ["Lines", "lines_of", "read_turned", "turned_array", "turned_get", "verify"]

Array = NDArray[Any]
Indices = NDArray[np.int64]
Get = Callable[[str], Any]

_LONG_LINE = 64
"""So many neighbouring elements are read where they lie; shorter runs are picked out of a longer line."""
TOLERANCE = 1e-4
"""The largest difference of outputs that float32 excuses, as a share of the largest output, or of 1."""


@dataclass(frozen=True)
class Lines:
    """A turned tensor as lines that lie whole in the source.

    Attributes:
        leading: the sizes of the axes that number the lines.
        orders: for each of them the index array, of one axis or two (see :class:`~mergetool.anatomy.Turn`), or None.
        length: elements of a line.
        inside: which element of the source's line stands at each place, [length] or [shape[0], length], or None.
    """

    leading: tuple[int, ...]
    orders: tuple[Indices | None, ...]
    length: int
    inside: Indices | None

    def sources(self, lines: Indices) -> Indices:
        """The numbers in the source of these lines of the turned tensor."""
        if not self.leading:
            return lines
        places = np.unravel_index(lines, self.leading)
        moved = []
        for place, order in zip(places, self.orders, strict=True):
            moved.append(place if order is None else order[place] if order.ndim == 1 else order[places[0], place])
        return np.asarray(np.ravel_multi_index(tuple(moved), self.leading), dtype=np.int64)

    def inner(self, line: int) -> Indices | None:
        """The order inside one line of the turned tensor."""
        if self.inside is None or self.inside.ndim == 1:
            return self.inside
        return np.asarray(self.inside[line // prod(self.leading[1:])])


def lines_of(shape: Sequence[int], indices: Mapping[int, Indices]) -> Lines:
    """Divide a tensor into the longest lines that need no more than one order inside them.

    Args:
        shape: of the tensor.
        indices: axis → index array, as of :class:`~mergetool.anatomy.Turn`.
    """
    if not indices:
        return Lines((), (), prod(shape), None)
    last = max(indices)
    run = prod(shape[last + 1 :])
    if run >= _LONG_LINE and last + 1 < len(shape):
        return Lines(tuple(shape[: last + 1]), tuple(indices.get(axis) for axis in range(last + 1)), run, None)
    order = indices[last]
    inside = order[..., None] * run + np.arange(run)
    inside = inside.reshape(*order.shape[:-1], shape[last] * run)
    return Lines(tuple(shape[:last]), tuple(indices.get(axis) for axis in range(last)), shape[last] * run, inside)


def read_turned(
    reader: Reader,
    entry: Entry,
    indices: Mapping[int, Indices],
    start: int = 0,
    stop: int | None = None,
    into: Array | None = None,
) -> Array:
    """The raw elements ``[start, stop)`` of a turned tensor, counted in its flat order.

    Rows that lie together in the source are read together; besides what it returns, it holds one line.

    Args:
        reader: the source's file.
        entry: the source's tensor, :attr:`~mergetool.anatomy.Turn.tensor`.
        indices: axis → index array.
        start: the first element.
        stop: one more than the last; all that follow if None.
        into: a flat array of ``entry.dtype.storage`` to fill where anything is turned; a new one if None.

    Returns:
        The flat array of ``entry.dtype.storage``.

    Raises:
        CheckpointError: elements are narrower than a byte, or the file ends too early.
        ValueError: the range is not inside the tensor.
        RunError: the disk fails.
    """
    if not indices:
        return reader.read(entry, start, stop)
    if entry.dtype.bits % 8:
        what = f"{entry.name} has elements of {entry.dtype.bits} bits, which cannot change places"
        raise CheckpointError(what, str(reader.path), "align a model in a wider dtype")
    stop = entry.size if stop is None else stop
    if not 0 <= start <= stop <= entry.size:
        raise ValueError(f"elements {start} to {stop} are not inside {entry.name!r}, which has {entry.size}")
    result = np.empty(stop - start, entry.dtype.storage) if into is None else into
    if stop > start:
        _fill(result, reader, entry, lines_of(entry.shape, indices), start)
    return result


def _fill(result: Array, reader: Reader, entry: Entry, lines: Lines, start: int) -> None:
    """Fill ``result`` with the turned elements from ``start`` on."""
    width, stop = lines.length, start + len(result)
    first, last = start // width, (stop - 1) // width
    sources = lines.sources(np.arange(first, last + 1, dtype=np.int64))
    if lines.inside is not None:
        for number, source in enumerate(sources.tolist(), first):
            low, high = max(start, number * width), min(stop, (number + 1) * width)
            order = lines.inner(number)
            if order is not None:
                result[low - start : high - start] = _picked(
                    reader, entry, source * width, order[low - number * width : high - number * width]
                )
        return
    for number, source, count in _runs(sources, first):
        low, high = max(start, number * width), min(stop, (number + count) * width)
        offset = (source - number) * width
        buffer = result[low - start : high - start]
        reader.read_into(buffer, entry.start + (low + offset) * buffer.itemsize)


def _picked(reader: Reader, entry: Entry, offset: int, order: Indices) -> Array:
    """Elements of one line, which starts at ``offset``, in this order."""
    low, high = int(order.min()), int(order.max()) + 1
    return np.asarray(reader.read(entry, offset + low, offset + high)[order - low])


def _runs(sources: Indices, first: int) -> Iterator[tuple[int, int, int]]:
    """Lines that follow one another in both tensors: the number of the first, its source and how many there are."""
    cuts = np.flatnonzero(np.diff(sources) != 1) + 1
    starts = [0, *cuts.tolist()]
    for at, end in zip(starts, [*starts[1:], len(sources)], strict=True):
        yield first + at, int(sources[at]), end - at


def turned_get(get: Get, turning: Turning) -> Callable[[str], Array]:
    """A getter of turned tensors from a getter of the source's.

    Args:
        get: reads an array of the source by name.
        turning: what is turned.
    """

    def turned(name: str) -> Array:
        values = np.asarray(get(turning.source(name)))
        return turned_array(values, turning.of(name, values.shape).indices)

    return turned


def verify(
    outputs: Callable[[Get], Array | Sequence[Array]],
    get: Get,
    turning: Turning,
    tolerance: float = TOLERANCE,
    excused: float = 0.0,
) -> float:
    """Check that a turned model computes what its source does.

    Args:
        outputs: runs a model, whose tensors the given getter reads by name, on some fixed batches in float32.
        get: reads an array of the source by name.
        turning: what is turned.
        tolerance: the largest difference allowed, times the largest output where that is more than 1.
        excused: the share of each array's rows, those that differ most, that does not count: where two experts are
            as good as equal, the last bit of a router decides which of them is asked.

    Returns:
        The largest difference that counts.

    Raises:
        RunError: the outputs differ by more.
        NonFinite: the source's own outputs are not finite.
    """
    pairs = [_arrays(outputs(each)) for each in (get, turned_get(get, turning))]
    largest, worst = 1.0, 0.0
    for before, after in zip(*pairs, strict=True):
        if not np.isfinite(before).all():
            raise NonFinite("the model's own outputs have a NaN or an infinity", fix="check it with `mergetool verify`")
        largest = max(largest, float(np.abs(before).max(initial=0.0)))
        worst = max(worst, _difference(before, after, excused))
    if worst > tolerance * largest:
        allowed = tolerance * largest
        raise RunError(
            f"the turned model is another function: its outputs differ by {worst:.3g}, where {allowed:.3g} is allowed",
            fix="this architecture has something that align does not know; leave groups out of align.groups",
        )
    return worst


def _difference(before: Array, after: Array, excused: float) -> float:
    """The largest difference of the rows that count; infinity where there is a NaN."""
    if before.size == 0:
        return 0.0
    rows = np.sort(np.abs(before - after).reshape(-1, before.shape[-1] if before.ndim else 1).max(axis=1))
    largest = float(rows[len(rows) - 1 - int(len(rows) * excused)])
    return np.inf if np.isnan(rows).any() else largest


def _arrays(outputs: Array | Sequence[Array]) -> list[Array]:
    found = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [np.asarray(each, dtype=np.float64) for each in found]
