"""How far a run is: a bar on a terminal, lines elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import sys
import threading
import time
from typing import IO, Protocol

from mergetool.plan.columns import size

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What the engine tells while it works; any thread may call :meth:`advance`."""

    def start(self, total: int, label: str) -> None:
        """Begin a stage of ``total`` bytes, read and written."""

    def advance(self, nbytes: int) -> None:
        """Note bytes that are done."""

    def close(self) -> None:
        """End the stage."""


class Quiet:
    """Says nothing."""

    def start(self, total: int, label: str) -> None:
        """Begin a stage."""

    def advance(self, nbytes: int) -> None:
        """Note bytes that are done."""

    def close(self) -> None:
        """End the stage."""


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self._lock = threading.Lock()

    def start(self, total: int, label: str) -> None:
        """Begin a stage."""
        self._total, self._label, self._done = max(total, 1), label, 0
        self._began = self._last = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Note bytes that are done; speak when it is time."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._last >= SECONDS_BETWEEN_LINES:
                self._last = now
                self._say(now)

    def close(self) -> None:
        """End the stage with a last line."""
        with self._lock:
            self._say(time.monotonic())

    def _say(self, now: float) -> None:
        took = max(now - self._began, 1e-9)
        rest = self._total - self._done
        left = f"{took * rest / self._done:.0f} s left" if 0 < rest < self._total else ""
        print(
            f"{self._label}: {self._done / self._total:4.0%}  {size(self._done)} of {size(self._total)}"
            f"  {size(round(self._done / took))}/s  {left}".rstrip(),
            file=self.stream,
            flush=True,
        )


class Bar:
    """A tqdm bar by bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def start(self, total: int, label: str) -> None:
        """Begin a stage."""
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, dynamic_ncols=True)

    def advance(self, nbytes: int) -> None:
        """Note bytes that are done."""
        with self._lock:
            self._bar.update(nbytes)

    def close(self) -> None:
        """End the stage."""
        self._bar.close()


def progress(quiet: bool = False) -> Progress:
    """The kind that suits standard error: quiet, a bar on a terminal, else lines."""
    if quiet:
        return Quiet()
    return Bar() if sys.stderr.isatty() else Lines()
