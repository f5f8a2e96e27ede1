"""A run's report: its sections kept beside the facts while jobs run, and drawn into the output when it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.errors import CheckpointError, MergetoolError, PlanError, RunError
from mergetool.execute.prepared import Prepared
from mergetool.execute.progress import Progress
from mergetool.methods import METHODS
from mergetool.plan import Plan
from mergetool.publish.page import NUMBERS, Drawn, draw_report, numbers_file
from mergetool.publish.sections import Section, as_json, from_json
from mergetool.storage.writer import atomic_write

if TYPE_CHECKING:
    from mergetool.execute.fact_folder import Facts

KEPT = "report.json"
"""Where the sections wait, in the folder of facts beside the output in the making."""


def keep(
    plan: Plan, made: Prepared, folder: Path, *, trust_code: bool, device: str, progress: Progress, root: Path | None
) -> tuple[str, ...]:
    """Gather what the facts of a run show, compare the models where the plan says so, and keep it for the end.

    Args:
        plan: the plan.
        made: what was turned, measured and trained.
        folder: where it is kept; a run that goes on, or the next part, finds it there.
        trust_code: whether the recipe's adapter may be run.
        device: where models are run.
        progress: is told how many bytes of weights are done.
        root: where folders of facts are kept; the cache by default.

    Returns:
        What the user should know: what is missing, and why.

    Raises:
        RunError: the disk is full or fails.
        PlanError: the recipe asks for a comparison, and its data or its adapter cannot be used for that.
    """
    if plan.recipe.report is not None and not plan.recipe.report.draw:
        return ()
    if (found := _read(folder)) is not None:
        return found[1]
    from mergetool.execute.report.gather import gather

    notes: list[str] = []
    pairs = _compared(plan, notes, trust_code, device, progress, root)
    sections = gather(plan, made, pairs, notes.append)
    atomic_write(folder / KEPT, json.dumps({**as_json(sections), "notes": notes}, ensure_ascii=False))
    return tuple(notes)


def _compared(
    plan: Plan, notes: list[str], trust_code: bool, device: str, progress: Progress, root: Path | None
) -> Mapping[tuple[int, int], Facts]:
    """How alike the models are; nothing where that cannot be told and nobody insists on it."""
    from mergetool.execute.report.compare import compare

    try:
        return compare(plan, trust_code=trust_code, device=device, progress=progress, root=root)
    except Exception as error:  # nothing that is only to be looked at is worth a merge
        insists = plan.recipe.report is not None and bool(plan.recipe.report.cka)
        if disk_failed(error) or (insists and isinstance(error, PlanError)):
            raise
        notes.append(f"the models were not compared for the report: {said(error)}")
        return {}


def disk_failed(error: Exception) -> bool:
    """Whether it is the disk that failed: then the rest would fail as well."""
    return isinstance(error, RunError) and isinstance(error.__cause__, OSError)


def said(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, MergetoolError):
        problem = error.problems[0]
        return f"{problem.where}: {problem.what}" if problem.where else problem.what
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _read(folder: Path) -> tuple[tuple[Section, ...], tuple[str, ...]] | None:
    """What waits in a folder: sections and notes; None where nothing does."""
    try:
        found = json.loads((folder / KEPT).read_bytes())
        return from_json(found, str(folder / KEPT)), tuple(found["notes"])
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None


def drawn(plan: Plan, folder: Path) -> tuple[Drawn, tuple[str, ...]]:
    """The report of what waits in a folder, and what the user should know; only numbers where it cannot be drawn."""
    found = _read(folder)
    if found is None or not found[0]:
        return Drawn(), ()
    return _drawn(found[0], f"{METHODS[plan.recipe.merge_method].title}: what the facts of this merge show")


def _drawn(sections: Sequence[Section], title: str) -> tuple[Drawn, tuple[str, ...]]:
    try:
        return draw_report(sections, title), ()
    except Exception as error:  # nothing that is only to be looked at is worth a merge
        why = "matplotlib is not installed" if isinstance(error, ImportError) else said(error)
        note = f"the report was not drawn, {NUMBERS} has its numbers: {why}"
        return Drawn({NUMBERS: numbers_file(sections, title)}), (note,)
