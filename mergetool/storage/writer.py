"""Output files: laid out in full when opened, then written at any offset from any thread, past the page cache."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np

from mergetool.storage import system
from mergetool.storage.shards import Shard, index, shard
from mergetool.storage.system import Buffer

__all__ = ["Shard", "Writer", "atomic_write", "index", "shard"]

DIRECT_BYTES = 256 << 10
"""Shorter pieces are not worth a wait for the disk; they go through the page cache."""


class Writer:
    """One output file; every write names its own offset, so threads share a writer without a lock.

    The file has its full size and its header from the start; the data that nobody wrote are zeros. Where the file
    system can, whole pages of large pieces go straight to the disk: taking a fresh page of cache for every page that
    is written costs more than the merge's arithmetic. A piece must for that lie in memory at the same place within
    its page as it does on the disk.

    Args:
        path: the file to make. What has that name is replaced, not written into: it may link to a source.
        shard: what the file will hold.
        resume: keep the file at ``path`` if it was laid out for the same shard.

    Attributes:
        fresh: whether the file was laid out anew. A resumed run must not count on any data in a fresh file.
        cached: about how many bytes went through the page cache since the last :meth:`sync`.

    Raises:
        RunError: the disk is full or fails.
        OutputRefused: the file may not be written.
    """

    def __init__(self, path: str | os.PathLike[str], shard: Shard, resume: bool = False) -> None:
        self.path = Path(path)
        self.shard = shard
        self._fd = self._direct = -1
        self.cached = 0
        try:
            self.fresh = not (resume and self._reopen())
            if self.fresh:
                self._create()
            self._direct = self._open_direct()
            self._pages = self._direct >= 0
        except OSError as error:
            self._give_up()
            raise system.write_failure(error, self.path, shard.nbytes) from error

    def _reopen(self) -> bool:
        """Open a file that an earlier run laid out for the same shard, if that is what stands at the path."""
        try:
            fd = system.open_file(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return False
            raise
        preamble = self.shard.preamble
        found = bytearray(len(preamble))
        same = False
        try:
            # The size is set first and the header written last, so a file that has both was laid out to the end.
            same = (
                os.fstat(fd).st_size == self.shard.nbytes
                and system.read_all(fd, found, 0) == len(found)
                and found == preamble
            )
        finally:
            if not same:
                system.drop(fd)
        self._fd = fd if same else -1
        return same

    def _create(self) -> None:
        self.path.unlink(missing_ok=True)
        self._fd = system.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            system.allocate(self._fd, self.shard.nbytes)
        except (OSError, AttributeError) as error:  # macOS has no such call, some file systems refuse it
            refused = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
            if isinstance(error, OSError) and error.errno not in refused:
                raise
            system.truncate(self._fd, self.shard.nbytes)
        system.write_all(self._fd, self.shard.preamble, 0)

    def _open_direct(self) -> int:
        """The same file once more, for writes past the page cache; -1 where they do not pay or cannot be had."""
        if self.shard.nbytes < DIRECT_BYTES or not hasattr(os, "O_DIRECT"):
            return -1
        try:
            return system.open_file(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return -1
            raise

    def _give_up(self) -> None:
        """Close and remove a file that could not be laid out, to give back the space it took."""
        if self._fd >= 0:
            self.close()
            self.path.unlink(missing_ok=True)

    def write(self, buffer: Buffer, offset: int) -> None:
        """Write a contiguous ``buffer`` at byte ``offset`` of the file.

        Raises:
            ValueError: the bytes would not lie inside the file's data.
            RunError: the disk is full or fails.
        """
        view = system.as_bytes(buffer)
        self._check_inside(offset, len(view))
        try:
            self._put(view, offset)
        except OSError as error:
            raise system.write_failure(error, self.path, self.shard.nbytes) from error

    def _put(self, view: memoryview, offset: int) -> None:
        """Write whole pages directly if there are enough of them, and what is left through the page cache."""
        first = -offset % system.PAGE
        last = len(view) - (offset + len(view)) % system.PAGE
        if self._pages and last - first >= DIRECT_BYTES and _place(view[first:]) == 0:
            done = first + system.write_direct(self._direct, view[first:last], offset + first)
            if done == first:  # the file system refuses what it let us open
                self._pages = False
            system.write_all(self._fd, view[:first], offset)
            view, offset = view[done:], offset + done
        system.write_all(self._fd, view, offset)
        self.cached += len(view)

    def _check_inside(self, offset: int, nbytes: int) -> None:
        if offset < self.shard.header.data_start or offset + nbytes > self.shard.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are not inside the data of {self.path.name}")

    def sync(self) -> None:
        """Wait until all that was written has reached the disk.

        Raises:
            RunError: the disk is full or failed on bytes that it had seemed to accept; they count as lost.
        """
        self.cached = 0
        try:
            system.fsync(self._fd)
        except OSError as error:
            raise system.write_failure(error, self.path, self.shard.nbytes) from error

    def close(self) -> None:
        """Close the file; more than once is fine."""
        fd, self._fd = self._fd, -1
        direct, self._direct = self._direct, -1
        if direct >= 0:
            system.drop(direct)
        if fd >= 0:
            system.close(fd)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _place(view: memoryview) -> int:
    """Where in its page of memory a buffer begins."""
    return int(np.frombuffer(view, np.uint8).ctypes.data) % system.PAGE


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a small file so that at every moment the path holds the old content or the new, whole and synced.

    Args:
        path: the file; its folder exists.
        data: the content; text is written as UTF-8.

    Raises:
        RunError: the disk is full or fails.
        OutputRefused: the file may not be written.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    # The process and the thread keep two writers of the same path from sharing a temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        fd = system.open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            system.write_all(fd, content, 0)
            system.fsync(fd)
        finally:
            system.close(fd)
        system.rename(temporary, path)
        system.sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise system.write_failure(error, path, len(content)) from error
