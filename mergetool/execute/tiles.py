"""A job's tiles: kept in memory, or read again for each pass; by one worker, or by all of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import gcd
from typing import TypeVar

from mergetool.execute.batch import spans
from mergetool.execute.buffers import Arena, Bytes, typed
from mergetool.execute.turned import read_turned
from mergetool.execute.turns import Turns
from mergetool.kernels.backend import Array
from mergetool.kernels.calling import LINE
from mergetool.methods.apply import portion
from mergetool.plan import Job, Plan, Read
from mergetool.storage.header import Entry
from mergetool.storage.reader import Reader

R = TypeVar("R")
Inputs = tuple[Array, ...]


Window = Mapping[tuple[int, str], Bytes]
"""The bytes of whole tensors, by source and name."""


class Stopped(Exception):
    """Another job has failed; this one is given up."""


class Counter:
    """A sum that any thread may add to."""

    def __init__(self) -> None:
        self.total = 0
        self._guard = threading.Lock()

    def add(self, amount: int) -> None:
        """Add to the sum."""
        with self._guard:
            self.total += amount


@dataclass(frozen=True)
class Sources:
    """The open files of a plan's sources, and what their readers share."""

    readers: Mapping[tuple[int, str], Reader]
    arena: Arena
    windows: Arena
    """Another one, for what a batch's tensors are read into together."""
    stop: threading.Event
    counter: Counter = field(default_factory=Counter)
    turns: Turns | None = None
    """What is turned while it is read; None: nothing."""
    window: Window = field(default_factory=dict)
    """What has been read already of a batch's tensors."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, every pass counted."""
        return self.counter.total

    def ahead(self, jobs: Sequence[Job]) -> Sources:
        """The same files with a window on what jobs read, each run of tensors side by side read by one call.

        The window lasts until this thread asks for another one. Turned sources have no part in it.
        """
        if self.stop.is_set():
            raise Stopped
        turned = self.turns or ()
        wanted = [span for span in spans(jobs) if span.source not in turned]
        starts = list(accumulate((span.nbytes + LINE for span in wanted), initial=0))
        (room,) = self.windows.take([starts[-1]])
        window: dict[tuple[int, str], Bytes] = {}
        for span, begin in zip(wanted, starts, strict=False):
            begin += (span.start - begin) % LINE  # where numbers lie at multiples of their width, as they do on disk
            raw = room[begin : begin + span.nbytes]
            self.counter.add(span.nbytes)
            self.readers[span.source, span.file].read_into(raw, span.start)
            for read in span.reads:
                if read.tensor.start % read.tensor.dtype.storage.itemsize == 0:
                    first = read.tensor.start - span.start
                    window[read.source, read.tensor.name] = raw[first : first + read.tensor.nbytes]
        return replace(self, window=window)

    def seen(self, reads: Sequence[Read], start: int, stop: int) -> Inputs | None:
        """Coordinates ``start`` to ``stop`` of each tensor where they lie in the window; None if some do not."""
        if self.stop.is_set():
            raise Stopped
        tile = tuple(values for read in reads if (values := self._there(read, start, stop)) is not None)
        return tile if len(tile) == len(reads) else None

    def _there(self, read: Read, start: int, stop: int) -> Array | None:
        raw = self.window.get((read.source, read.tensor.name))
        if raw is None:
            return None
        first, last = _place(read, start, stop)
        return typed(raw[first:last], read.tensor.dtype.storage)

    def load(self, reads: Sequence[Read], start: int, stop: int, into: Sequence[Array]) -> Inputs:
        """Read coordinates ``start`` to ``stop`` of each tensor into buffers of bytes."""
        if self.stop.is_set():
            raise Stopped
        tile = []
        for read, buffer in zip(reads, into, strict=True):
            first, last = _place(read, start, stop)
            raw = buffer[: last - first]
            values = typed(raw, read.tensor.dtype.storage)
            tile.append(values)
            if (there := self._there(read, start, stop)) is not None:
                values[...] = there
                continue
            self.counter.add(last - first)
            tensor, indices = (read.tensor, None) if self.turns is None else self.turns.of(read)
            reader = self.readers[read.source, tensor.file]
            if indices:
                entry = Entry(tensor.name, tensor.dtype, tensor.shape, tensor.start, tensor.start + tensor.nbytes)
                read_turned(reader, entry, indices, start, stop, into=values)
            else:
                reader.read_into(raw, tensor.start + first)
        return tuple(tile)


def _place(read: Read, start: int, stop: int) -> tuple[int, int]:
    """The bytes of a run of coordinates, from the tensor's first one on."""
    bits = read.tensor.dtype.bits
    return start * bits // 8, -(-stop * bits // 8)


@dataclass(frozen=True)
class Tiles:
    """Goes over the tiles of a job; see :class:`mergetool.methods.apply.Visit`.

    ``do`` gets the tile's first coordinate and its inputs. Of what is read, each worker keeps as much as it may in its
    arena until the job is done, so that whoever comes to such a tile again finds it there, most likely in a nearby
    cache; the rest is read for each pass.
    """

    sources: Sources
    reads: Sequence[Read]
    size: int
    tile: int
    pool: Executor | None = None
    """Where the tiles of one tensor are worked on together; None: one after another, here."""
    room: int = 0
    """Bytes that a worker may keep."""
    kept: dict[int, Inputs] = field(default_factory=dict)
    """By their first coordinates the tiles that are kept, whoever keeps them."""
    used: dict[int, int] = field(default_factory=dict)
    """Bytes that each worker keeps."""

    def visit(self, do: Callable[[int, Inputs], R], share: float = 1.0) -> Iterator[tuple[int, R]]:
        """Read each tile, or a share of it, and call ``do`` on it."""

        def one(start: int) -> tuple[int, R]:
            stop = start + portion(min(self.tile, self.size - start), share)
            return start, do(start, self._inputs(start, stop, share == 1.0))

        starts = range(0, self.size, self.tile)
        return map(one, starts) if self.pool is None else self.pool.map(one, starts)

    def _inputs(self, start: int, stop: int, whole: bool) -> Inputs:
        if (there := self.sources.seen(self.reads, start, stop)) is not None:
            return there
        if start in self.kept:
            return tuple(values[: stop - start] for values in self.kept[start])
        *buffers, room = self.sources.arena.take([*self._widths(self.tile), self.room])
        worker = threading.get_ident()
        begin, widths = self.used.get(worker, 0), self._widths(stop - start)
        keeps = whole and begin + sum(widths) <= self.room
        if keeps:
            places = accumulate(widths, initial=begin)
            buffers = [room[place : place + width] for place, width in zip(places, widths, strict=False)]
        inputs = self.sources.load(self.reads, start, stop, buffers)
        if keeps:
            self.used[worker] = begin + sum(widths)
            self.kept[start] = inputs
        return inputs

    def _widths(self, count: int) -> list[int]:
        """The bytes of so many coordinates of each tensor, up to a cache line's end."""
        return [-(-count * read.tensor.dtype.bits // (8 * LINE)) * LINE for read in self.reads]


def tiles(plan: Plan, job: Job, reads: Sequence[Read], sources: Sources, again: bool, pool: Executor | None) -> Tiles:
    """Choose how a job's tensors are gone over.

    Args:
        plan: the plan.
        job: the job.
        reads: the tensors to go over, all of the job's shape.
        sources: the open files.
        again: whether several passes are needed, so that keeping what was read pays.
        pool: where to work on the tiles of one tensor together, if that is wanted.
    """
    size = job.size
    # Of elements that share bytes so many more that a tile is a whole number of digests' blocks, as all others are.
    tile = plan.memory.tile * 8 // gcd(8, job.dtype.bits)
    room = plan.memory.resident if again else 0
    return Tiles(sources, reads, size, tile, pool, room and room + LINE * len(reads))
