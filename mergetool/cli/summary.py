"""What a finished run has done, in a few lines or as data."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergetool.plan.columns import columns, plural, size

if TYPE_CHECKING:
    from mergetool.plan import Job, Report
    from mergetool.plan.report import PartReport

WORTH_A_SPEED = 100_000_000
"""Of fewer bytes read and written the time says more about starting than about speed."""


def lines(report: Report, quiet: bool = False) -> list[str]:
    """The summary for people; ``quiet`` leaves only what they should know."""
    notes = [f"note: {note}" for note in report.notes]
    if quiet:
        return notes
    if report.tasks:
        return [*(line for each in report.tasks for line in lines(replace(each, notes=()))), *notes]
    if report.unchanged:
        return [f"{report.output} is complete already; nothing was done", *notes]
    data = as_json(report)
    moved = data["bytes_read"] + data["bytes_written"]
    speed = f", {moved / 1e6 / max(report.seconds, 1e-9):,.0f} MB/s read and written"
    rows = [
        ("merged", plural(data["merged"], "tensor")),
        ("copied", plural(data["copied"], "tensor")),
        ("added", f"{plural(data['added'], 'tensor')} for what was corrected"),
        ("continued", f"{plural(report.resumed, 'tensor')} from an interrupted run"),
        ("read", size(data["bytes_read"])),
        ("written", size(data["bytes_written"])),
        ("took", f"{report.seconds:.1f} s" + ("" if report.resumed or moved < WORTH_A_SPEED else speed)),
    ]
    left_out = {"continued": report.resumed, "added": data["added"]}
    shown = [row for row in rows if left_out.get(row[0], True)]
    return [str(report.output), *columns(shown), *notes]


def finish_lines(report: Report, quiet: bool = False) -> list[str]:
    """The summary of what was put together."""
    if quiet or report.unchanged:
        return lines(report, quiet)
    rows = [
        ("checked", f"{plural(len(report.plan.jobs), 'tensor')}, {size(report.bytes_written)}"),
        ("took", f"{report.seconds:.1f} s"),
    ]
    return [str(report.output), *columns(rows), *(f"note: {note}" for note in report.notes)]


def part_lines(report: PartReport, recipe: str, quiet: bool = False) -> list[str]:
    """The summary of a part; the last line says what is to be done next."""
    notes = [f"note: {note}" for note in report.notes]
    if quiet:
        return notes
    if report.unchanged:
        return [f"{report.output} is complete already; nothing was done", *notes]
    rows = [
        ("made", plural(len(report.digests), "tensor")),
        ("continued", f"{plural(report.resumed, 'tensor')} from an interrupted run"),
        ("read", size(report.bytes_read)),
        ("written", size(report.bytes_written)),
        ("took", f"{report.seconds:.1f} s"),
    ]
    shown = [row for row in rows if row[0] != "continued" or report.resumed]
    return [f"part {report.share} of {report.output}", *columns(shown), *notes, _next(report, recipe)]


def _next(report: PartReport, recipe: str) -> str:
    if report.missing:
        return f"still missing: {plural(len(report.missing), 'part')}, {', '.join(map(str, report.missing))}"
    command = f"mergetool finish {shlex.quote(recipe)} {shlex.quote(str(report.output))}"
    return f"all parts are done; with the same --set and --shard-size, if any, run: {command}"


def part_as_json(report: PartReport) -> dict[str, Any]:
    """The report of a part as plain data; keys are only ever added."""
    return {
        "output": str(report.output),
        "part": report.share.part,
        "parts": report.share.parts,
        "missing": [share.part for share in report.missing],
        "unchanged": report.unchanged,
        "made": len(report.digests),
        "resumed": report.resumed,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "seconds": report.seconds,
        "notes": list(report.notes),
        "nonfinite": dict(report.nonfinite),
        "digests": dict(report.digests),
    }


def _is_copy(job: Job) -> bool:
    """Whether the numbers of one source come out as they are."""
    return not job.added and (not job.method or (job.method == "passthrough" and job.parameters["scale"] == (1.0,)))


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data; keys are only ever added."""
    copied = sum(map(_is_copy, report.plan.jobs))
    added = sum(job.added for job in report.plan.jobs)
    return {
        "output": str(report.output),
        "unchanged": report.unchanged,
        "merged": len(report.plan.jobs) - copied - added,
        "copied": copied,
        "added": added,
        "resumed": report.resumed,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "seconds": report.seconds,
        "notes": list(report.notes),
        "nonfinite": dict(report.nonfinite),
        "plan": report.plan.digest,
        "digests": dict(report.digests),
        "tasks": [as_json(each) for each in report.tasks],
    }
