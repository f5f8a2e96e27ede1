"""The few calls to the operating system, made whole: short reads and writes and interruptions end here.

Every file that storage touches goes through the short functions at the top, always as ``system.pwrite(…)``,
so that a test can replace one of them and see what a full disk or a half-done write does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from mergetool.errors import OutputRefused, RunError

Buffer: TypeAlias = "bytes | bytearray | memoryview | np.ndarray[Any, Any]"

# Linux moves at most 2 GiB - 4 KiB in one call and macOS refuses 2 GiB outright, so ask for less.
LARGEST_CALL = 1 << 30
PAGE = 4096
"""What direct writes keep to: their place in memory, their place on disk and their length are multiples of it."""

open_file = os.open
close = os.close
fsync = os.fsync
rename = os.replace


def preadv(fd: int, view: memoryview, offset: int) -> int:
    """Read into ``view`` from byte ``offset``; the number of bytes read, which may be short."""
    return os.preadv(fd, [view], offset)


def pwrite(fd: int, view: memoryview, offset: int) -> int:
    """Write ``view`` at byte ``offset``; the number of bytes written, which may be short."""
    return os.pwrite(fd, view, offset)


def allocate(fd: int, nbytes: int) -> None:
    """Reserve ``nbytes`` of disk, so that a full disk shows at once and not after an hour."""
    os.posix_fallocate(fd, 0, nbytes)


def truncate(fd: int, nbytes: int) -> None:
    """Set the length of the file, reserving nothing."""
    os.ftruncate(fd, nbytes)


def as_bytes(buffer: Buffer) -> memoryview:
    """The bytes of a contiguous buffer as a flat view, without a copy.

    Raises:
        TypeError: the buffer is not C-contiguous.
    """
    view = memoryview(cast(Any, buffer))  # arrays are buffers, but only Python 3.12 can say so
    if view.nbytes == 0:  # a view with a zero in its shape cannot be cast
        return memoryview(b"")
    return view if view.ndim == 1 and view.format == "B" and view.contiguous else view.cast("B")


def read_all(fd: int, buffer: Buffer, offset: int) -> int:
    """Fill ``buffer`` from byte ``offset``; the number of bytes read, fewer only where the file ends."""
    view = as_bytes(buffer)
    done = 0
    while done < len(view):
        try:
            count = preadv(fd, view[done : done + LARGEST_CALL], offset + done)
        except InterruptedError:
            continue
        if count == 0:
            break
        done += count
    return done


def write_all(fd: int, buffer: Buffer, offset: int) -> None:
    """Write the whole of ``buffer`` at byte ``offset``."""
    view = as_bytes(buffer)
    done = 0
    while done < len(view):
        try:
            count = pwrite(fd, view[done : done + LARGEST_CALL], offset + done)
        except InterruptedError:
            continue
        if count == 0:  # no error and no progress: POSIX allows it, a loop must not spin on it
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count


def write_direct(fd: int, buffer: Buffer, offset: int) -> int:
    """Write ``buffer`` past the page cache through a file opened for that; all three of :data:`PAGE`.

    Returns:
        The bytes written from the start of the buffer: all of them, or fewer where the file system will not take
        the rest in this way.
    """
    view = as_bytes(buffer)
    done = 0
    while done < len(view) and done % PAGE == 0:
        try:
            count = pwrite(fd, view[done : done + LARGEST_CALL], offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                break
            raise
        if count == 0:
            break
        done += count
    return done


def drop(fd: int) -> None:
    """Close a file that was only read: whatever close says, all was read that was wanted."""
    with contextlib.suppress(OSError):
        close(fd)


def sync_folder(path: Path) -> None:
    """Make a new name in the folder ``path`` survive a power cut, where the file system can promise it."""
    fd = open_file(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        close(fd)


def read_failure(error: OSError, path: Path) -> RunError:
    """What to tell the user when the file at ``path`` opened well and a later read failed."""
    if error.errno == errno.EIO:
        return RunError(
            "the disk reports an error while this file is read",
            where=str(path),
            fix="check the disk (the kernel log names the fault), or fetch the file again to another disk",
        )
    return RunError(f"cannot be read: {error.strerror or error}", where=str(path))


def write_failure(error: OSError, path: Path, nbytes: int | None = None) -> RunError:
    """What to tell the user when the file at ``path`` (of ``nbytes`` in all) cannot be made or written."""
    where, needed = str(path), "" if nbytes is None else f" for the {nbytes:,} bytes of this file"
    match error.errno:
        case errno.ENOSPC:
            return RunError(
                f"the disk is full{_free(path)}: no space left{needed}",
                where,
                "free some space and run again, or choose an output folder on a larger disk",
            )
        case errno.EDQUOT:
            return RunError(
                f"the disk quota is used up: no space left{needed}",
                where,
                "free some space and run again, or choose an output folder elsewhere",
            )
        case errno.EROFS:
            return OutputRefused("the file system is read-only", where, "choose an output folder that can be written")
        case errno.EACCES | errno.EPERM:
            return OutputRefused(
                "permission denied",
                where,
                "choose an output folder that you may write, or change its permissions",
            )
        case errno.EIO:
            return RunError(
                "the disk reports an error while this file is written",
                where,
                "check the disk (the kernel log names the fault) and write to another one",
            )
        case errno.EFBIG:
            return RunError(
                f"the file system does not allow a file this large{needed}",
                where,
                "ask for smaller shards, or choose an output folder on another disk",
            )
        case errno.EMFILE | errno.ENFILE:
            return RunError("too many files are open", where, "raise the limit (`ulimit -n 4096`) and run again")
        case _:
            return RunError(f"cannot be written: {error.strerror or error}", where)


def _free(path: Path) -> str:
    """How much is free on the disk of ``path``, for a message; empty where that cannot be asked."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return ""
    return f" ({disk.f_bavail * disk.f_frsize:,} bytes free)"
