"""Positional reads of one safetensors file, from any number of threads at once."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mergetool.errors import CheckpointError, SourceChanged
from mergetool.storage import system
from mergetool.storage.header import Entry, Header, open_source
from mergetool.storage.system import Buffer


class Reader:
    """One open file; every read names its own offset, so threads share a reader without a lock.

    Args:
        path: the file.
        expected: its header as read before. A file of another size is refused at once.

    Raises:
        CheckpointError: the file cannot be opened.
        SourceChanged: its size is not that of ``expected``.
    """

    def __init__(self, path: str | os.PathLike[str], expected: Header | None = None) -> None:
        self.path = Path(path)
        self._fd = open_source(self.path)
        self.identity = _identity(os.fstat(self._fd))
        size = self.identity[0]
        if expected is not None and size != expected.file_size:
            self.close()
            raise SourceChanged(
                f"the file has {size} bytes now and had {expected.file_size} when it was planned with",
                where=str(self.path),
                fix="plan again, and leave the sources alone while they are merged",
            )

    def read_into(self, buffer: Buffer, offset: int) -> None:
        """Fill the writable, contiguous ``buffer`` with the bytes of the file from ``offset`` on.

        Raises:
            CheckpointError: the file ends before the buffer is full.
            RunError: the disk fails.
        """
        view = system.as_bytes(buffer)
        try:
            count = system.read_all(self._fd, view, offset)
        except OSError as error:
            raise system.read_failure(error, self.path) from error
        if count < len(view):
            raise CheckpointError(
                f"is truncated: ends at byte {offset + count}, {offset + len(view)} expected",
                where=str(self.path),
                fix="download it again",
            )

    def read(self, entry: Entry, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """The raw elements ``[start, stop)`` of a tensor, counted in its flat order.

        Returns:
            A new flat array of ``entry.dtype.storage``: packed bytes where elements are narrower than a byte.

        Raises:
            ValueError: the range is not inside the tensor, or cuts through a byte.
            CheckpointError: the file ends too early.
            RunError: the disk fails.
        """
        stop = entry.size if stop is None else stop
        if not 0 <= start <= stop <= entry.size:
            raise ValueError(f"elements {start} to {stop} are not inside {entry.name!r}, which has {entry.size}")
        bits = entry.dtype.bits
        if start * bits % 8 or stop * bits % 8:
            raise ValueError(f"elements {start} to {stop} of {entry.name!r} cut through a byte")
        first, last = start * bits // 8, stop * bits // 8
        storage = entry.dtype.storage
        raw = np.empty((last - first) // storage.itemsize, storage)
        self.read_into(raw, entry.start + first)
        return raw

    def advise(self, offset: int, length: int) -> None:
        """Tell the system that ``length`` bytes from ``offset`` are wanted soon; a mere hint."""
        if hasattr(os, "posix_fadvise"):
            try:
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)
            except OSError:  # some file systems know no hints, and a hint is all this is
                return

    def forget(self, offset: int, length: int) -> None:
        """Tell the system that ``length`` bytes from ``offset`` need not stay in the page cache; a mere hint."""
        if hasattr(os, "posix_fadvise"):
            try:
                os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)
            except OSError:  # as above
                return

    def changed(self) -> bool:
        """Whether the file at the path is no longer the one that was opened, by size, time or inode."""
        try:
            return _identity(os.stat(self.path)) != self.identity
        except OSError:
            return True

    def close(self) -> None:
        """Close the file; more than once is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            system.drop(fd)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    """Size in bytes, time of the last change in nanoseconds, inode."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
