"""Locks that end with the process that holds them: one run of the whole at a time, or one of each part."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mergetool.errors import OutputRefused
from mergetool.execute.journal import LOCK, lock_name, share_of
from mergetool.plan.parts import Share

LAYOUT, FACTS = ".lock-layout", ".lock-facts"
"""What a part holds while it makes something that other parts need too."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file to lock, made if it is not there; closing it gives the lock back."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for it as long as it takes."""
    with opened(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def hold(lock: int, path: Path, output: Path, share: Share | None, held: contextlib.ExitStack) -> None:
    """Keep others out: a run of the whole everybody, a part those who make the whole or the same part.

    Args:
        lock: the opened lock of the folder.
        path: the folder.
        output: what it becomes.
        share: the part.
        held: keeps the part's own lock.

    Raises:
        OutputRefused: somebody is in there.
    """
    if not _taken(lock, fcntl.LOCK_EX if share is None else fcntl.LOCK_SH):
        running = [] if share is not None else _running(path)
        parts = ", ".join(map(str, running))
        what = f"part {parts} of this output is running" if running else "another run is making this output"
        raise OutputRefused(what, str(output), "wait for it to end")
    if not _same_file(lock, path / LOCK):
        raise OutputRefused("another run has just made this output", str(output), "run again to check it")
    if share is not None and not _taken(held.enter_context(opened(path / lock_name(share)))):
        raise OutputRefused(f"part {share} of this output is running already", str(output), "wait for it to end")


def _taken(descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if nobody is in the way."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _running(path: Path) -> list[Share]:
    """The parts that somebody works on."""
    found = []
    for each in path.iterdir():
        share = share_of(each.name)
        if share is not None and each.name == lock_name(share):
            with opened(each) as lock:
                found += [] if _taken(lock) else [share]
    return sorted(found)


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to the file that was opened there."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
