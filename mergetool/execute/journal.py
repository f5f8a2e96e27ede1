"""What runs write down while they work: a line for each tensor whose bytes are in their file; one journal to a part."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.execute.job import Outcome
from mergetool.plan.parts import Share
from mergetool.storage import system

JOURNAL = ".journal.jsonl"
LOCK = ".lock"
_PART = re.compile(r"\.(?:journal|lock)-(\d+)-of-(\d+)(?:\.jsonl)?")


def journal_name(share: Share | None) -> str:
    """The journal of a part, or of a run of the whole."""
    return JOURNAL if share is None else f".journal-{share.part}-of-{share.parts}.jsonl"


def lock_name(share: Share) -> str:
    """What a part holds while it runs."""
    return f".lock-{share.part}-of-{share.parts}"


def share_of(name: str) -> Share | None:
    """The part that a journal or a lock is of; None for anything else."""
    found = _PART.fullmatch(name)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    return Share(part, parts) if 1 <= part <= parts else None


@dataclass(frozen=True)
class Record:
    """What a journal says."""

    run: str
    """What the run is known by; see :func:`mergetool.plan.digest.run_digest`."""
    share: Share | None
    done: Mapping[str, Outcome]
    nbytes: int
    """How long it is without a line that a kill cut short."""


def read_journal(path: Path) -> Record | None:
    """What a journal says; None where there is none, or nothing that can be read."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return None
    head = _entry(lines[0]) if lines else {}
    if not isinstance(head.get("run"), str):
        return None
    whole, done = 0, {}
    for line in lines:
        entry = _entry(line)
        if not entry:
            break  # a line cut short by a kill, and nothing can follow it
        whole += len(line)
        if entry.keys() >= {"tensor", "digest", "bad", "unequal"}:
            done[entry["tensor"]] = Outcome(entry["digest"], entry["bad"], tuple(entry["unequal"]))
    return Record(head["run"], share_of(path.name), done, whole)


def read_journals(folder: Path) -> dict[str, Record]:
    """Every journal in a folder by its name, those of parts last: what a part says of a tensor counts more."""
    names = [path.name for path in folder.glob(".journal*.jsonl") if path.name == JOURNAL or share_of(path.name)]
    found = {name: read_journal(folder / name) for name in sorted(names, reverse=True)}
    return {name: record for name, record in found.items() if record is not None}


def _entry(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


class Journal:
    """A journal that is being written; any thread may.

    Args:
        path: the file.
        run: what the run is known by.
        share: the part whose journal it is.

    Raises:
        OSError: it cannot be opened.
        RunError: the disk is full or fails.
    """

    def __init__(self, path: Path, run: str, share: Share | None) -> None:
        self.path = path
        self._guard = threading.Lock()
        record = read_journal(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(self._file, record.nbytes if record is not None and record.run == run else 0)
            if os.fstat(self._file).st_size == 0:
                self._write({"run": run} | ({"part": share.part, "parts": share.parts} if share else {}))
        except BaseException:
            self.close()
            raise

    def note(self, outcomes: Mapping[str, Outcome]) -> None:
        """Write down that tensors' bytes are in their files, all lines by one call; a kill may leave the first ones.

        Raises:
            RunError: the disk is full or fails.
        """
        self._write(
            *(
                {"tensor": name, "digest": outcome.digest, "bad": dict(outcome.bad), "unequal": outcome.unequal}
                for name, outcome in outcomes.items()
            )
        )

    def _write(self, *entries: Mapping[str, Any]) -> None:
        """Add lines; the end is looked up each time, for the file may have been emptied meanwhile."""
        lines = "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()
        try:
            with self._guard:
                system.write_all(self._file, lines, os.fstat(self._file).st_size)
        except OSError as error:
            raise system.write_failure(error, self.path, len(lines)) from error

    def clear(self) -> None:
        """Forget all of it."""
        with self._guard:
            os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
