"""A command run and measured: seconds, peak anonymous memory, bytes read and written. Linux only."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SHORTEST, LONGEST = 0.001, 0.02
"""Seconds between two looks at a process's memory: a hundredth of its age, so that short lives are seen in detail."""
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Cost:
    """What a command cost."""

    wall: float
    user: float
    system: float
    anonymous: int
    """Peak anonymous memory in bytes."""
    called: tuple[int, int]
    """Bytes that its calls read and wrote, the page cache's included; what it reads by mapping a file is not."""
    disk: tuple[int, int]
    """Bytes read from the disk, and bytes that were to be written to it."""
    output: str

    def numbers(self) -> dict[str, float]:
        """All but the output, by a name with its unit."""
        return {
            "wall_s": self.wall,
            "user_s": self.user,
            "system_s": self.system,
            "anonymous_MB": self.anonymous / 1e6,
            "called_read_MB": self.called[0] / 1e6,
            "called_written_MB": self.called[1] / 1e6,
            "disk_read_MB": self.disk[0] / 1e6,
            "disk_written_MB": self.disk[1] / 1e6,
        }


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    # Files, not pipes: nobody reads while the command runs, and a full pipe would stop it.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=complaints, env={**os.environ, **(environment or {})})
        try:
            peak = _watch(process.pid, began)
        except BaseException:  # nobody waits for it any more
            process.kill()
            raise
        wall = time.perf_counter() - began
        counted = _counted(process.pid)
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code)
        said.seek(0), complaints.seek(0)
        output = said.read()
        if process.returncode:
            complaint = (output + complaints.read())[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{complaint}")
    called, disk = (counted["rchar"], counted["wchar"]), (counted["read_bytes"], counted["write_bytes"])
    return Cost(wall, usage.ru_utime, usage.ru_stime, peak, called, disk, output)


def _watch(pid: int, began: float) -> int:
    """Wait until a process has ended, but do not reap it; its peak anonymous memory."""
    ended = os.pidfd_open(pid)
    sizes = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    peak = 0
    try:
        while True:
            _, resident, shared, *_ = os.pread(sizes, 256, 0).split()
            peak = max(peak, (int(resident) - int(shared)) * PAGE)
            age = time.perf_counter() - began
            if poll.poll(1000 * min(LONGEST, max(SHORTEST, age / 100))):
                return peak
    finally:
        os.close(sizes)
        os.close(ended)


def _counted(pid: int) -> dict[str, int]:
    """What the system counted of a process that has ended and is not reaped."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def settle(*written: Path) -> None:
    """Remove what earlier commands wrote and let the disk come to rest, so that nobody pays for another."""
    for path in written:
        remove(path)
    os.sync()


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def warm(files: Sequence[Path]) -> None:
    """Read files into the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def evict(files: Sequence[Path]) -> None:
    """Take files out of the page cache; needs no rights."""
    os.sync()  # pages that are not written yet would stay
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def chill(files: Sequence[Path]) -> str:
    """Drop the whole page cache where that is allowed, else the files alone; says which."""
    evict(files)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return "the sources are not in the page cache"
    return "the page cache is empty, Python's own files included"
