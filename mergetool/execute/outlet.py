"""Results on their way to the disk: buffers that workers fill and a few threads write, so that neither waits."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from mergetool.execute.buffers import Bytes, aligned
from mergetool.execute.tiles import Stopped
from mergetool.plan.memory import WRITERS
from mergetool.storage.system import PAGE
from mergetool.storage.writer import DIRECT_BYTES, Writer

_PATIENCE = 0.1  # seconds between two looks whether the run has been given up


class Sink(Protocol):
    """Where a result goes, piece by piece, in any order and from any worker."""

    def take(self, start: int, nbytes: int) -> Bytes:
        """A buffer for the bytes from ``start`` of the tensor on."""

    def put(self, start: int, raw: Bytes) -> None:
        """Take over what has been put in the buffer."""


class Memory:
    """A tensor that is made in memory."""

    def __init__(self, nbytes: int) -> None:
        self.raw: Bytes = np.empty(nbytes, np.uint8)

    def take(self, start: int, nbytes: int) -> Bytes:
        """The place of these bytes in the whole."""
        return self.raw[start : start + nbytes]

    def put(self, start: int, raw: Bytes) -> None:
        """Nothing is left to do."""


class Outlet(ThreadPoolExecutor):
    """The buffers and the threads that write them.

    Args:
        nbytes: of the largest piece.
        workers: how many threads fill buffers; there is one for each of them and for each writer.
        stop: set when the run is given up.
        allocate: makes a buffer that begins with a page.
    """

    def __init__(
        self, nbytes: int, workers: int, stop: threading.Event, allocate: Callable[[int], Bytes] = aligned
    ) -> None:
        super().__init__(WRITERS, "mergetool-write")
        self._stop = stop
        self._free: queue.LifoQueue[Bytes] = queue.LifoQueue()  # the last one used is the likeliest to be in a cache
        for _ in range(workers + WRITERS):
            self._free.put(allocate(nbytes + PAGE))

    def take(self) -> Bytes:
        """A free buffer, when there is one.

        Raises:
            Stopped: the run has been given up meanwhile.
        """
        while True:
            try:
                return self._free.get(timeout=_PATIENCE)
            except queue.Empty:
                if self._stop.is_set():
                    raise Stopped from None

    def give(self, buffer: Bytes) -> None:
        """Give a buffer back."""
        self._free.put(buffer)


class FileSink:
    """A tensor that is written to its place in a file.

    Args:
        outlet: lends the buffers and writes them.
        writer: the file.
        offset: where in it the tensor begins.
        advance: told of every byte written.
    """

    def __init__(self, outlet: Outlet, writer: Writer, offset: int, advance: Callable[[int], None]) -> None:
        self._outlet = outlet
        self._writer = writer
        self._offset = offset
        self._advance = advance
        self._taken: dict[int, Bytes] = {}
        self._going: list[Future[None]] = []

    def take(self, start: int, nbytes: int) -> Bytes:
        """A buffer that begins where within its page it will begin on the disk, as direct writes ask for."""
        buffer = self._outlet.take()
        self._taken[start] = buffer
        phase = _phase(self._offset + start)
        return buffer[phase : phase + nbytes]

    def put(self, start: int, raw: Bytes) -> None:
        """Have a large piece written; write a small one, which only goes to the page cache, at once."""
        if raw.nbytes < DIRECT_BYTES:
            self._write(start, raw)
        else:
            self._going.append(self._outlet.submit(self._write, start, raw))

    def wait(self) -> None:
        """Wait until all that was put is written.

        Raises:
            RunError: the disk is full or fails.
        """
        for going in self._going:
            going.result()

    def _write(self, start: int, raw: Bytes) -> None:
        try:
            self._writer.write(raw, self._offset + start)
            self._advance(raw.nbytes)
        finally:
            self._outlet.give(self._taken.pop(start))


class Joined:
    """What one worker makes of a batch: results that lie side by side in a file share a buffer and are one write.

    Args:
        outlet: lends the buffers and writes them.
    """

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._writer: Writer | None = None
        self._buffer: Bytes | None = None
        self._offset = self._phase = self._used = 0
        self._going: list[Future[None]] = []

    def sink(self, writer: Writer, offset: int, width: int) -> Sink:
        """A tensor that is written from ``offset`` of a file on; filled before the next one is begun.

        Args:
            writer: the file.
            offset: where in it the tensor begins.
            width: bytes of an element.
        """
        return _Part(self, writer, offset, width)

    def take(self, writer: Writer, offset: int, nbytes: int, width: int) -> Bytes:
        """Room for the next bytes of a file, behind those that wait to be written if they follow and fit."""
        place = self._phase + self._used
        follows = writer is self._writer and offset == self._offset + self._used and not place % width
        if self._buffer is None or not follows or place + nbytes > self._buffer.nbytes:
            self.flush()
            self._buffer = self._outlet.take()
            self._writer, self._offset, self._phase = writer, offset, _phase(offset, width)
            place = self._phase
        return self._buffer[place : place + nbytes]

    def put(self, nbytes: int) -> None:
        """Count on so many bytes more of what was taken last."""
        self._used += nbytes

    def flush(self) -> None:
        """Have written what waits for it: much of it by the outlet's threads, little at once.

        Raises:
            RunError: the disk is full or fails.
        """
        buffer, used, self._buffer, self._used = self._buffer, self._used, None, 0
        if buffer is None or self._writer is None:
            return
        raw = buffer[self._phase : self._phase + used]
        if used < DIRECT_BYTES:
            self._write(self._writer, raw, self._offset, buffer)
        else:
            self._going.append(self._outlet.submit(self._write, self._writer, raw, self._offset, buffer))

    def wait(self) -> None:
        """Wait until all that was flushed is written.

        Raises:
            RunError: the disk is full or fails.
        """
        for going in self._going:
            going.result()

    def _write(self, writer: Writer, raw: Bytes, offset: int, buffer: Bytes) -> None:
        try:
            writer.write(raw, offset)
        finally:
            self._outlet.give(buffer)


class _Part:
    """One tensor of several that are written together."""

    def __init__(self, joined: Joined, writer: Writer, offset: int, width: int) -> None:
        self._joined = joined
        self._writer = writer
        self._offset = offset
        self._width = width

    def take(self, start: int, nbytes: int) -> Bytes:
        """Its place behind what was made before it."""
        return self._joined.take(self._writer, self._offset + start, nbytes, self._width)

    def put(self, start: int, raw: Bytes) -> None:
        """It is written with those that follow."""
        self._joined.put(raw.nbytes)


def _phase(offset: int, width: int = 8) -> int:
    """Where in its page a buffer begins, as direct writes ask for; numbers lie at multiples of their width."""
    phase = offset % PAGE
    return 0 if phase % width else phase
