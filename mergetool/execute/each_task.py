"""A model for each task: whatever makes one folder is done for each of them, and told as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mergetool.errors import OutputRefused
from mergetool.plan import Plan, Report
from mergetool.plan.report import PartReport
from mergetool.plan.tasks import tasks
from mergetool.publish import PROVENANCE

R = TypeVar("R")


def each_task(plan: Plan, output: Path | str | None, make: Callable[[Plan, Path], R]) -> tuple[Path, list[R]]:
    """Make the folder of every task in the output, one after the other.

    Args:
        plan: of a recipe that corrects towards each task's model.
        output: where their folders go; by default the plan's.
        make: makes one.

    Raises:
        OutputRefused: there is no output, or it is a model itself.
    """
    target = Path(output) if output is not None else plan.output
    if target is None:
        raise OutputRefused("there is no output", fix="set `output` in the recipe or name a folder")
    if (target / PROVENANCE).exists():
        what = "is a merged model, and would hold a model of each task"
        raise OutputRefused(what, str(target), "choose another output, or remove it")
    return target, [make(each, target / each.task) for each in tasks(plan)]


def folders(folder: Path) -> list[Path]:
    """The model folders that a folder stands for: itself, or those of its tasks."""
    if (folder / PROVENANCE).exists() or not folder.is_dir():
        return [folder]
    return sorted(path for path in folder.iterdir() if (path / PROVENANCE).exists()) or [folder]


def told(plan: Plan, output: Path, reports: Sequence[Report]) -> Report:
    """The reports of all tasks as one."""
    return Report(
        plan=plan,
        output=output,
        digests={f"{each.plan.task}/{name}": digest for each in reports for name, digest in each.digests.items()},
        notes=_notes(reports),
        nonfinite={f"{each.plan.task}/{name}": count for each in reports for name, count in each.nonfinite.items()},
        seconds=sum(each.seconds for each in reports),
        resumed=sum(each.resumed for each in reports),
        bytes_read=sum(each.bytes_read for each in reports),
        unchanged=all(each.unchanged for each in reports),
        tasks=tuple(reports),
    )


def told_part(output: Path, reports: Sequence[PartReport]) -> PartReport:
    """The reports of a part of every task's model as one."""
    named = [(each.output.name, each) for each in reports]
    return replace(
        reports[0],
        output=output,
        digests={f"{task}/{name}": digest for task, each in named for name, digest in each.digests.items()},
        notes=_notes(reports),
        nonfinite={f"{task}/{name}": count for task, each in named for name, count in each.nonfinite.items()},
        seconds=sum(each.seconds for each in reports),
        resumed=sum(each.resumed for each in reports),
        bytes_read=sum(each.bytes_read for each in reports),
        bytes_written=sum(each.bytes_written for each in reports),
        missing=tuple(sorted({share for each in reports for share in each.missing})),
        unchanged=all(each.unchanged for each in reports),
    )


def _notes(reports: Sequence[Report] | Sequence[PartReport]) -> tuple[str, ...]:
    def every() -> Iterator[str]:
        for each in reports:
            yield from each.notes

    return tuple(dict.fromkeys(every()))
