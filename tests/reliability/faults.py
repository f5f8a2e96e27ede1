"""Faults injected where mergetool meets the operating system: chosen calls fail, fall short or are interrupted.

Everything that storage does goes through the functions at the top of :mod:`mergetool.storage.system`. A
:class:`Faults` takes their places for a while, counts their calls from any thread, lets those fail that a schedule
names, and keeps a record of all:

    with Faults([Fault("pwrite", 3, errno.ENOSPC, nbytes=10)]) as faults:
        run(plan, output)
    assert faults.hits
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mergetool.storage import system

R = TypeVar("R")

CALLS = ("open_file", "close", "preadv", "pwrite", "allocate", "truncate", "fsync", "rename")
"""The functions that faults can be injected into."""
MOVES = ("preadv", "pwrite")
"""Those that move bytes and may move fewer than they were asked to."""


@dataclass(frozen=True)
class Fault:
    """What becomes of the ``number``-th call (from 1) of a function.

    With a ``code`` alone it fails with that error and does nothing. With ``nbytes`` it moves so many bytes at most;
    if there is a code too, the next call for the same file fails with it: a disk that fills up in mid-write.
    """

    call: str
    number: int
    code: int = 0
    nbytes: int | None = None
    lasting: bool = False
    """Whether every later call fails with the code too."""

    def __post_init__(self) -> None:
        assert self.call in CALLS
        assert self.number > 0
        assert self.code or self.nbytes is not None
        assert self.nbytes is None or self.call in MOVES


@dataclass(frozen=True)
class Call:
    """A call that was made, and the fault that befell it."""

    name: str
    number: int
    path: str
    fault: Fault | None


class Faults:
    """A schedule of faults; what was called while it was installed is kept."""

    def __init__(self, schedule: Iterable[Fault] = ()) -> None:
        self.schedule = tuple(schedule)
        self.calls: list[Call] = []
        self._true = {name: getattr(system, name) for name in CALLS}
        self._counts: Counter[str] = Counter()
        self._armed: dict[tuple[str, int], Fault] = {}
        self._guard = threading.Lock()

    @property
    def hits(self) -> list[Call]:
        """The calls that a fault befell."""
        return [call for call in self.calls if call.fault is not None]

    @property
    def totals(self) -> Counter[str]:
        """How often each function was called."""
        return Counter(self._counts)

    def __enter__(self) -> Faults:
        for name in CALLS:
            setattr(system, name, self._faulty(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, true in self._true.items():
            setattr(system, name, true)

    def _faulty(self, name: str) -> Callable[..., Any]:
        true = self._true[name]

        def call(*arguments: Any) -> Any:
            fault = self._note(name, arguments)
            if fault is None:
                return true(*arguments)
            if fault.nbytes is not None:
                fd, view, offset = arguments
                return true(fd, view[: fault.nbytes], offset)
            if name == "close":  # an error of close is told after the descriptor is gone
                true(*arguments)
            raise OSError(fault.code, os.strerror(fault.code))

        return call

    def _note(self, name: str, arguments: tuple[Any, ...]) -> Fault | None:
        """Count a call, and say what is to become of it."""
        path = _path(name, arguments)
        with self._guard:
            self._counts[name] += 1
            number = self._counts[name]
            fault = self._armed.pop((name, arguments[0]), None) if name in MOVES else None
            fault = fault or next((f for f in self.schedule if _befalls(f, name, number)), None)
            if fault is not None and fault.nbytes is not None and fault.number < number and fault.lasting:
                fault = Fault(name, number, fault.code)  # the bytes that fitted have been moved
            if fault is not None and fault.nbytes is not None and fault.code:
                self._armed[name, arguments[0]] = Fault(name, number + 1, fault.code)
            self.calls.append(Call(name, number, path, fault))
        return fault


def _befalls(fault: Fault, name: str, number: int) -> bool:
    later = fault.lasting and fault.code and number > fault.number
    return fault.call == name and bool(number == fault.number or later)


def _path(name: str, arguments: tuple[Any, ...]) -> str:
    """The file that a call is about: by its descriptor, or the new name of a rename."""
    if name in ("open_file", "rename"):
        return os.fsdecode(arguments[-1 if name == "rename" else 0])
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{arguments[0]}")
    return ""


def within(seconds: float, work: Callable[[], R]) -> R:
    """Do some work; one that hangs fails, and where every thread stands is shown."""
    done: list[R] = []
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            done.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, name="watched", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        faulthandler.dump_traceback(sys.__stderr__)
        raise AssertionError(f"this hangs: it has not ended in {seconds} seconds")
    if raised:
        raise raised[0]
    return done[0]


@contextlib.contextmanager
def no_leak() -> Iterator[None]:
    """See that no more files are open afterwards than before."""
    before = _descriptors()
    yield
    left = _descriptors().items() - before.items()
    assert not left, f"left open: {sorted(left)}"


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the descriptor that lists the folder is gone
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found
