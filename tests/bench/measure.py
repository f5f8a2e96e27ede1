"""A command run and measured: wall and processor seconds, peak anonymous memory."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Cost:
    """What a command cost."""

    wall: float
    cpu: float
    anonymous: int
    """Peak anonymous memory in bytes."""
    output: str


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while True:
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        except OSError:
            found = None
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(POLL_SECONDS)
    wall = time.perf_counter() - began
    assert process.stdout is not None
    output = process.stdout.read()
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak, output)


def drop_caches() -> bool:
    """Drop the page cache; whether that is allowed here."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def warm(files: Sequence[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
