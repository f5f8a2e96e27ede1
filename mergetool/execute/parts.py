"""A run in parts: each made on its own into the same hidden folder; then all checked, and the folder completed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mergetool.errors import Problem, RunError
from mergetool.execute.ahead import made_ahead, with_findings
from mergetool.execute.devices import backend_for, gpu_memory
from mergetool.execute.each_task import each_task, told, told_part
from mergetool.execute.engine import Engine
from mergetool.execute.intact import spoilt
from mergetool.execute.journal import read_journals
from mergetool.execute.progress import Progress, Quiet
from mergetool.execute.run import (
    complete,
    complete_already,
    destination,
    findings,
    nonfinite,
    room,
)
from mergetool.execute.sources import fetched
from mergetool.execute.staging import Staging, fits, staging, staging_path
from mergetool.plan import Job, Plan, Report
from mergetool.plan.columns import plural
from mergetool.plan.parts import Share, needed, owners
from mergetool.plan.report import PartReport
from mergetool.plan.tasks import several
from mergetool.storage.writer import Writer

_SHOWN = 3
"""So many tensors are named."""


@gpu_memory()
def run_part(
    plan: Plan,
    share: Share,
    output: Path | str | None = None,
    *,
    device: str = "cpu",
    force: bool = False,
    allow_nonfinite: bool = False,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> PartReport:
    """Make one part of the output's tensors; :func:`finish` makes a model folder of all.

    Parts may run one after the other or at the same time, on any machines that see the same files. A part that was
    interrupted continues when it is called again.

    Args:
        plan: what :func:`mergetool.build` returned; the same for all parts.
        share: which part.
        output: the folder to make; by default the plan's.
        device: ``cpu``, or ``cuda``, ``cuda:1``, ….
        force: replace an output folder that is not ours or of another recipe, when the parts are finished.
        allow_nonfinite: write NaNs and infinities instead of stopping at the first tensor that has any.
        trust_code: run the code of the recipe's ``calibration.adapter``.
        progress: told of every byte; by default nobody is.

    Raises:
        OutputRefused: the output exists, the same part or a run of the whole is working on it, it cannot be written,
            or it was begun by another plan or in another number of parts.
        NonFinite: a source or a result has a NaN or an infinity.
        SourceChanged: a source's file is not what was planned with.
        CheckpointError: a source's file ends early.
        RunError: the disk is full or fails.
        PlanError: there is no such device, or the calibration data or the adapter cannot be used.
    """
    if several(plan):
        how: dict[str, Any] = {"device": device, "force": force, "allow_nonfinite": allow_nonfinite}
        how |= {"trust_code": trust_code, "progress": progress}
        return told_part(*each_task(plan, output, lambda one, to: run_part(one, share, to, **how)))
    began = time.monotonic()
    target = destination(plan, output, force)
    backend = backend_for(device)
    jobs = share.of(plan.jobs)
    nbytes = sum(job.bytes_written for job in jobs)
    if not force and (whole := complete_already(plan, target, began, allow_nonfinite)) is not None:
        digests = {job.name: whole.digests[job.name] for job in jobs}
        return PartReport(share, target, digests, whole.notes, {}, whole.seconds, 0, 0, nbytes, (), True)
    with staging(plan, target, share) as stage:
        room(plan, target, stage)
        ahead = made_ahead(plan, stage, trust_code, device, progress)
        ready = with_findings(fetched(needed(plan, jobs), ahead.turnings), stage)
        engine = Engine(ready, jobs, stage, backend, progress or Quiet(), allow_nonfinite, ahead, ahead.turnings)
        made = engine.run()
        done = {name for record in read_journals(stage.path).values() for name in record.done}
        missing = _missing(plan, share, done | made.keys())
    outcomes = {job.name: made[job.name] for job in jobs}
    return PartReport(
        share=share,
        output=target,
        digests={name: outcome.digest for name, outcome in outcomes.items()},
        notes=(*ready.notes, *findings(outcomes)),
        nonfinite=nonfinite(outcomes),
        seconds=time.monotonic() - began,
        resumed=engine.resumed,
        bytes_read=engine.bytes_read,
        bytes_written=nbytes,
        missing=missing,
    )


def finish(
    plan: Plan, output: Path | str | None = None, *, force: bool = False, progress: Progress | None = None
) -> Report:
    """Check what all parts have made, and make the model folder of it; the same bytes as those of a single run.

    Every tensor is read back and compared with the digest that its part wrote down.

    Args:
        plan: what the parts were made of.
        output: the folder to make; by default the plan's.
        force: replace an output folder that is not ours or of another recipe.
        progress: told of every byte; by default nobody is.

    Raises:
        OutputRefused: the output exists, a part is running, or the parts are of another plan.
        CheckpointError: a source's file cannot be read or fetched.
        RunError: no part has run, some are not done, or bytes are not what was written; or the disk fails.
    """
    if several(plan):
        made = each_task(plan, output, lambda one, to: finish(one, to, force=force, progress=progress))
        return told(plan, *made)
    began = time.monotonic()
    target = destination(plan, output, force)
    path = staging_path(target)
    if (not force or not path.exists()) and (report := complete_already(plan, target, began)) is not None:
        return report
    if not path.is_dir() or not read_journals(path):
        raise RunError("nothing was begun that could be finished", str(target), "run its parts: `--part 1/8` and so on")
    fits(plan, path, None)  # asked before the folder is opened, for a run of the whole empties one of another plan
    with staging(plan, target) as stage:
        _check(plan, stage, progress or Quiet())
        return complete(with_findings(plan, stage), stage, target, stage.done, began, force)


def _missing(plan: Plan, share: Share, done: Collection[str]) -> tuple[Share, ...]:
    """The parts that have jobs which are not done."""
    left = {job.name for job in plan.jobs if job.name not in done}
    numbers = {part for part, job in zip(owners(plan.jobs, share.parts), plan.jobs, strict=True) if job.name in left}
    return tuple(Share(part, share.parts) for part in sorted(numbers))


def _check(plan: Plan, stage: Staging, progress: Progress) -> None:
    """See that every tensor is there as it was written down, and have the disk keep it.

    Raises:
        RunError: something is missing or spoilt; with a problem for each part that is to be run again.
    """
    done = stage.done
    progress.start(sum(job.bytes_written for job in plan.jobs if job.name in done), "check")
    try:
        with ThreadPoolExecutor(plan.memory.workers, "mergetool") as pool:
            bad = spoilt(plan.shards, stage.path, done, pool, progress.advance)
    finally:
        progress.close()
    if bad or len(done) < len(plan.jobs):
        raise RunError(list(_problems(plan, stage, bad)))
    try:
        for shard in plan.shards:
            with Writer(stage.path / shard.file, shard, resume=True) as writer:
                writer.sync()
    except RunError:  # what was read back may never have reached the disk
        stage.distrust()
        raise


def _problems(plan: Plan, stage: Staging, bad: Collection[str]) -> Iterator[Problem]:
    """One for each part that is to be run again; without parts one for the whole."""
    begun = {record.share for record in read_journals(stage.path).values() if record.share is not None}
    parts = next((share.parts for share in begun), 1)
    mine: dict[Share, list[Job]] = defaultdict(list)
    for part, job in zip(owners(plan.jobs, parts), plan.jobs, strict=True):
        mine[Share(part, parts)].append(job)
    for share, jobs in mine.items() if begun else ():
        if said := _said(jobs, stage.done, bad):
            what = f"part {share} {'is not done' if share in begun else 'was not run'}: {said}"
            yield Problem(what, stage.path.name, f"run it {'again ' if share in begun else ''}with `--part {share}`")
    if not begun:
        what = f"the run was interrupted: {_said(plan.jobs, stage.done, bad)}"
        yield Problem(what, stage.path.name, "run it again, or in parts")


def _said(jobs: Sequence[Job], done: Collection[str], bad: Collection[str]) -> str:
    """Which tensors are missing or spoilt; a few are named."""
    missing = [job.name for job in jobs if job.name not in done]
    changed = [job.name for job in jobs if job.name in bad]
    words = ((missing, "missing"), (changed, "not what was written"))
    counted = [(len(names), word, _few(names)) for names, word in words if names]
    return "; ".join(f"{count} of {plural(len(jobs), 'tensor')} {word} ({few})" for count, word, few in counted)


def _few(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
