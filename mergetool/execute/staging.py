"""The output folder while it is made: hidden, locked, journalled; renamed to its final name when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.errors import OutputRefused, RunError
from mergetool.execute.job import Outcome
from mergetool.execute.measure import FOLDER
from mergetool.plan import Plan
from mergetool.plan.output import refusal
from mergetool.publish import PROVENANCE, read_local
from mergetool.storage import system

JOURNAL = ".journal.jsonl"
LOCK = ".lock"


def staging_path(output: Path) -> Path:
    """Where an output is made: beside it, so that a rename is all that is left to do."""
    return output.with_name(f".{output.name}.partial")


def aside_path(output: Path) -> Path:
    """Where an output that is replaced waits until the new one has its name."""
    return output.with_name(f".{output.name}.replaced")


def read_provenance(output: Path) -> dict[str, Any] | None:
    """What a finished folder of ours says about itself; None when it is not ours."""
    try:
        found = json.loads((output / PROVENANCE).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "plan" in found else None


def refuse(plan: Plan, output: Path, force: bool) -> None:
    """Refuse an output that would overwrite a source or somebody's files.

    Raises:
        OutputRefused: it is or holds a source, is no folder, or is neither empty nor ours for the same recipe.
    """
    if not output.name:
        raise OutputRefused("is no folder that could be made", str(output), "name a folder in it")
    if problem := refusal(output, plan.sources, (staging_path(output), aside_path(output))):
        raise OutputRefused(problem)
    if not output.exists():
        return
    if force or not any(output.iterdir()):
        return
    ours = read_provenance(output)
    if ours is None or not _same_recipe(plan, output, ours):
        what = "exists already and is not a merge" if ours is None else "exists already, merged by another recipe"
        raise OutputRefused(what, str(output), "choose another output, or give `--force` to replace it")


def _same_recipe(plan: Plan, output: Path, ours: Mapping[str, Any]) -> bool:
    """Whether the recipe that made a folder is the plan's.

    What is published of a recipe does not tell `/a/model` from `/b/model`; where only that is left, the whole plan
    must be the same.
    """
    local = read_local(output)
    return bool(ours["plan"] == plan.digest if local is None else local.recipe == plan.recipe.canonical())


@dataclass
class Staging:
    """A folder that is being made."""

    path: Path
    done: dict[str, Outcome]
    """What an earlier run with the same plan left, by tensor."""
    _journal: int
    _guard: threading.Lock

    def note(self, name: str, outcome: Outcome) -> None:
        """Write down that a tensor's bytes are in their file."""
        line = json.dumps(
            {"tensor": name, "digest": outcome.digest, "bad": dict(outcome.bad), "unequal": outcome.unequal}
        )
        with self._guard:
            self._write(line)

    def _write(self, line: str) -> None:
        try:
            system.write_all(self._journal, f"{line}\n".encode(), os.fstat(self._journal).st_size)
        except OSError as error:
            raise system.write_failure(error, self.path / JOURNAL, len(line)) from error

    def forget(self, names: set[str]) -> None:
        """Do not count on tensors of a file that was laid out anew."""
        for name in names & self.done.keys():
            del self.done[name]

    def distrust(self) -> None:
        """Do not count on anything done so far, now or in a later run."""
        self.done.clear()
        with self._guard:
            os.ftruncate(self._journal, 0)

    def finish(self, output: Path) -> None:
        """Give the folder its final name; what stood there goes.

        The journal and the lock go last: until the folder has its name, they are what a later run continues from
        and what keeps others out.

        Raises:
            RunError: the rename failed; the work is kept, and so is what stood there.
        """
        aside = aside_path(output)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            if output.exists():
                system.rename(output, aside)
            try:
                system.rename(self.path, output)
            except OSError:
                if aside.exists():
                    system.rename(aside, output)
                raise
            _sweep(output)
            system.sync_folder(output.parent)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            raise system.write_failure(error, output) from error


def tidy(output: Path) -> None:
    """Remove what a run that was killed after its folder had its name left in it and beside it.

    Raises:
        RunError: it is there and cannot be removed.
    """
    try:
        _sweep(output)
    except OSError as error:
        raise system.write_failure(error, output) from error
    shutil.rmtree(aside_path(output), ignore_errors=True)


def _sweep(output: Path) -> None:
    for name in (JOURNAL, LOCK):
        if (output / name).exists():  # a file system that is read-only refuses to remove even what is not there
            (output / name).unlink(missing_ok=True)


@contextlib.contextmanager
def staging(plan: Plan, output: Path) -> Iterator[Staging]:
    """Open, or open again, the folder where an output is made; only one process holds it at a time.

    Raises:
        OutputRefused: another run works on it, or the place cannot be written.
    """
    path = staging_path(output)
    if path.is_symlink():  # what it leads to is not ours to empty
        raise OutputRefused("is a link", str(path), "remove the link")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputRefused(
            f"cannot be written: {error.strerror or error}", str(output.parent), "choose another output"
        ) from error
    journal = -1
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputRefused("another run is making this output", str(output), "wait for it to end") from None
        if not _same_file(lock, path / LOCK):
            raise OutputRefused("another run has just made this output", str(output), "run again to check it")
        done = _resume(plan, path)
        journal = os.open(path / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        made = Staging(path, done, journal, threading.Lock())
        if os.fstat(journal).st_size == 0:
            made._write(json.dumps({"plan": plan.digest}))
        yield made
    except OSError as error:
        raise RunError(f"{error.strerror or error}", str(path), "make room or choose another output") from error
    finally:
        if journal >= 0:
            os.close(journal)
        os.close(lock)


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to the file that was opened there."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _resume(plan: Plan, path: Path) -> dict[str, Outcome]:
    """What the journal of the same plan says is done; a folder of another plan is emptied.

    Of the same plan's only what is continued stays: nothing else that a killed run was writing gets published.
    """
    done: dict[str, Outcome] = {}
    journal = path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    ours = bool(lines) and _entry(lines[0]).get("plan") == plan.digest
    kept = {LOCK, JOURNAL, FOLDER, *(shard.file for shard in plan.shards)} if ours else {LOCK}
    for item in path.iterdir():
        if item.name not in kept:
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    if not ours:
        return {}
    whole = 0
    for line in lines:
        entry = _entry(line)
        if not entry:
            break  # a line cut short by a kill, and nothing can follow it
        whole += len(line)
        if entry.keys() >= {"tensor", "digest", "bad", "unequal"}:
            done[entry["tensor"]] = Outcome(entry["digest"], entry["bad"], tuple(entry["unequal"]))
    os.truncate(journal, whole)
    return done


def _entry(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}
