"""The output folder while it is made: hidden, locked, journalled; renamed to its final name when it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.errors import OutputRefused, RunError
from mergetool.execute.job import Outcome
from mergetool.execute.journal import JOURNAL, LOCK, Journal, journal_name, lock_name, read_journals, share_of
from mergetool.execute.locks import FACTS, LAYOUT, hold, opened, waiting
from mergetool.execute.measure import FOLDER
from mergetool.plan import Plan
from mergetool.plan.digest import run_digest
from mergetool.plan.output import refusal
from mergetool.plan.parts import Share
from mergetool.publish import PROVENANCE, read_local
from mergetool.storage import system


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
    """What earlier runs with the same plan left, by tensor; of a part's own tensors only."""
    share: Share | None
    """The part that is being made, if not all of it."""
    _journal: Journal

    def note(self, outcomes: Mapping[str, Outcome]) -> None:
        """Write down that tensors' bytes are in their files."""
        self._journal.note(outcomes)

    def forget(self, names: set[str]) -> None:
        """Do not count on tensors of a file that was laid out anew."""
        for name in names & self.done.keys():
            del self.done[name]

    def distrust(self) -> None:
        """Do not count on anything done so far, now or in a later run; but what other parts did is theirs."""
        self.done.clear()
        self._journal.clear()
        for name, record in read_journals(self.path).items():
            if self.share is None or record.share is None:
                os.truncate(self.path / name, 0)

    @contextlib.contextmanager
    def alone(self, lock: str) -> Iterator[None]:
        """Wait for other parts that make the same thing, and keep them out; a run of the whole is alone already."""
        with contextlib.ExitStack() as held:
            if self.share is not None:
                held.enter_context(waiting(self.path / lock))
            yield

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
    ours = [path for path in output.iterdir() if path.name in (JOURNAL, LOCK, LAYOUT, FACTS) or share_of(path.name)]
    for path in sorted(ours, key=lambda path: path.name == LOCK):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(plan: Plan, output: Path, share: Share | None = None) -> Iterator[Staging]:
    """Open, or open again, the folder where an output is made.

    Only one process holds it at a time, or one for each part.

    Raises:
        OutputRefused: another run works on it, it cannot be written, or a part does not fit what is in it.
    """
    path = staging_path(output)
    if path.is_symlink():  # what it leads to is not ours to empty
        raise OutputRefused("is a link", str(path), "remove the link")
    with contextlib.ExitStack() as held:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(opened(path / LOCK))
        except OSError as error:
            raise OutputRefused(
                f"cannot be written: {error.strerror or error}", str(output.parent), "choose another output"
            ) from error
        try:
            hold(lock, path, output, share, held)
            made = _open(plan, path, share)
            held.callback(made._journal.close)
            yield made
        except OSError as error:
            raise RunError(f"{error.strerror or error}", str(path), "make room or choose another output") from error


def _open(plan: Plan, path: Path, share: Share | None) -> Staging:
    """Take up what is there; parts do so one after the other, so that the first one's journal is there for the next."""
    with contextlib.ExitStack() as held:
        if share is not None:
            held.enter_context(waiting(path / LAYOUT))
            fits(plan, path, share)
        done = _resume(plan, path, share)
        return Staging(path, done, share, Journal(path / journal_name(share), run_digest(plan), share))


def fits(plan: Plan, path: Path, share: Share | None) -> None:
    """Refuse to add to what was begun otherwise: nobody but the user knows whether it is still wanted.

    Raises:
        OutputRefused: the folder holds work of another plan, or parts of another count.
    """
    records = read_journals(path).values()
    anew = f"or remove {path.name} to begin anew"
    run = run_digest(plan)
    if any(record.run != run for record in records):
        what = "was begun with another recipe, other sources or another shard size"
        raise OutputRefused(what, str(path), f"give what it was begun with, {anew}")
    counts = {record.share.parts for record in records if record.share is not None}
    if share is not None and counts - {share.parts}:
        count = min(counts - {share.parts})
        what = f"is being made in {count} parts, and {share} is none of them"
        raise OutputRefused(what, str(path), f"give `--part N/{count}`, {anew}")


def _resume(plan: Plan, path: Path, share: Share | None) -> dict[str, Outcome]:
    """What the journals of the same plan say is done; a folder of another plan is emptied.

    Of the same plan's only what is continued stays: nothing else that a killed run was writing gets published.
    """
    run = run_digest(plan)
    records = {name: record for name, record in read_journals(path).items() if record.run == run}
    if share is None or not records:
        kept = {LOCK, LAYOUT, FACTS, *([lock_name(share)] if share is not None else ())}
        if records:
            kept |= {*records, FOLDER, *(shard.file for shard in plan.shards)}
        for item in path.iterdir():
            if item.name not in kept:
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    done = {name: outcome for record in records.values() for name, outcome in record.done.items()}
    if share is None:
        return done
    return {job.name: done[job.name] for job in share.of(plan.jobs) if job.name in done}
