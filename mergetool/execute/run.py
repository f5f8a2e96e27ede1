"""Run a plan: fetch, measure, merge job by job with all workers, then complete the folder and give it its name."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergetool.errors import NonFinite, OutputRefused, Problem, RunError
from mergetool.execute.ahead import made_ahead, made_beside, with_findings
from mergetool.execute.devices import backend_for, gpu_memory, memory_for
from mergetool.execute.each_task import each_task, told
from mergetool.execute.engine import Engine
from mergetool.execute.job import Outcome
from mergetool.execute.measure import FOLDER
from mergetool.execute.merged import Merged, merged_weights
from mergetool.execute.prepare import prepare
from mergetool.execute.prepared import Prepared
from mergetool.execute.progress import Progress, Quiet
from mergetool.execute.report.draw import drawn
from mergetool.execute.sources import fetched
from mergetool.execute.staging import Staging, read_provenance, refuse, staging, tidy
from mergetool.kernels.backend import Array
from mergetool.plan import Job, Plan, Report
from mergetool.plan.digest import run_digest
from mergetool.plan.stages import wanted
from mergetool.plan.tasks import several
from mergetool.publish import publish

_NOT_FINITE = " is not finite: "
"""What notes say of a tensor that has NaNs or infinities."""


@gpu_memory()
def run(
    plan: Plan,
    output: Path | str | None = None,
    *,
    device: str = "cpu",
    force: bool = False,
    allow_nonfinite: bool = False,
    trust_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Execute a plan and write the merged model folder.

    The output appears under its name only when it is complete. A run that was interrupted continues where it
    stopped when it is called again with the same plan, and gives the same bytes.

    >>> plan = build(load("examples/linear.yaml"))
    >>> report = run(plan, "merged")
    >>> sorted(path.name for path in report.output.glob("*.safetensors"))
    ['model.safetensors']

    Args:
        plan: what :func:`mergetool.build` returned.
        output: the folder to make; by default the plan's.
        device: ``cpu``, or ``cuda``, ``cuda:1``, ``cuda:0,cuda:1``, ….
        force: replace an output folder that is not ours or of another recipe.
        allow_nonfinite: write NaNs and infinities instead of stopping at the first tensor that has any.
        trust_code: run the code of the recipe's ``calibration.adapter``.
        progress: told of every byte; by default nobody is.

    Raises:
        OutputRefused: the output exists, is locked by another run, or cannot be written.
        NonFinite: a source or a result has a NaN or an infinity.
        SourceChanged: a source's file is not what was planned with.
        CheckpointError: a source's file ends early.
        RunError: the disk is full or fails.
        PlanError: there is no such device, or the calibration data or the adapter cannot be used.
    """
    if several(plan):
        how: dict[str, Any] = {
            "device": device,
            "force": force,
            "allow_nonfinite": allow_nonfinite,
            "trust_code": trust_code,
        }
        return told(plan, *each_task(plan, output, lambda one, to: run(one, to, progress=progress, **how)))
    began = time.monotonic()
    target = destination(plan, output, force)
    if not force and (report := complete_already(plan, target, began, allow_nonfinite)) is not None:
        return report
    backend = backend_for(device)
    began = time.monotonic()
    with staging(plan, target) as stage:
        room(plan, target, stage)
        ahead = made_ahead(plan, stage, trust_code, device, progress)
        engine = Engine(
            with_findings(fetched(plan, ahead.turnings), stage),
            plan.jobs,
            stage,
            backend,
            progress or Quiet(),
            allow_nonfinite,
            ahead,
            ahead.turnings,
            memory_for(device),
        )
        outcomes = engine.run()
        report = complete(engine.plan, stage, target, outcomes, began, force)
    return replace(report, plan=plan, resumed=engine.resumed, bytes_read=engine.bytes_read)


def destination(plan: Plan, output: Path | str | None, force: bool) -> Path:
    """The folder to make, if it may be made.

    Raises:
        OutputRefused: there is none, or it would overwrite a source or somebody's files.
    """
    target = Path(output) if output is not None else plan.output
    if target is None:
        raise OutputRefused("there is no output", fix="set `output` in the recipe or name a folder")
    if target.name in ("", ".."):  # the folder needs a name, for another to stand beside it
        target = target.resolve()
    refuse(plan, target, force)
    return target


def complete_already(plan: Plan, target: Path, began: float, allow_nonfinite: bool = True) -> Report | None:
    """The report of a folder that is this plan's result, tidied up; None where there is work to do.

    Raises:
        NonFinite: the folder was made with what is not finite, and this run may not have any.
        RunError: what a killed run left in it cannot be removed.
    """
    ours = read_provenance(target)
    if ours is None or not _complete(plan, target, ours):
        return None
    tidy(target)
    bad = [note for note in ours["notes"] if _NOT_FINITE in note]
    if bad and not allow_nonfinite:
        fix = "mend the source and run again, or give `--allow-nonfinite` to keep the folder as it is"
        raise NonFinite(Problem(f"was made with --allow-nonfinite: {note}", str(target), fix) for note in bad[:10])
    return Report(plan, target, ours["tensors"], tuple(ours["notes"]), {}, time.monotonic() - began, 0, 0, True)


def complete(
    plan: Plan, stage: Staging, target: Path, outcomes: Mapping[str, Outcome], began: float, force: bool
) -> Report:
    """Make a model folder of the shards, and give it its name.

    Raises:
        OutputRefused: somebody has put something under that name meanwhile.
        CheckpointError: a source's file cannot be read or fetched.
        RunError: the disk is full or fails.
    """
    ordered = {job.name: outcomes[job.name] for job in plan.jobs}
    report, why_not = drawn(plan, stage.path / FOLDER)
    notes = (*plan.notes, *findings(ordered), *why_not)
    digests = {name: outcome.digest for name, outcome in ordered.items()}
    publish(plan, stage.path, digests, notes, made_beside(stage), report)
    shutil.rmtree(stage.path / FOLDER, ignore_errors=True)
    refuse(plan, target, force)
    stage.finish(target)
    return Report(plan, target, digests, notes, nonfinite(ordered), time.monotonic() - began, 0, 0)


def nonfinite(outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """How many coordinates of each tensor were not finite; only those with any."""
    return {name: sum(outcome.bad.values()) for name, outcome in outcomes.items() if outcome.bad}


def compute(plan: Plan, job: Job, device: str = "cpu", trust_code: bool = False) -> Array:
    """Make one output tensor in memory; what must be known of whole models first is made, or found in the cache.

    Returns:
        Its raw storage, flat: bfloat16 and float16 as uint16.

    Raises:
        CheckpointError: a source's file ends early.
        PlanError: there is no such device.
        MergetoolError: as :func:`mergetool.execute.prepare.prepare`.
    """
    with made_again(plan, (job,), device, trust_code) as weights:
        return weights.raw(job)


@contextlib.contextmanager
def made_again(plan: Plan, jobs: tuple[Job, ...], device: str = "cpu", trust_code: bool = False) -> Iterator[Merged]:
    """Some of a plan's tensors in memory, one at a time; what they need to know of whole models is made once for all.

    Only the files that they need are fetched.

    Args:
        plan: the plan.
        jobs: some of its jobs.
        device: where the kernels run.
        trust_code: whether the recipe's adapter may be run.

    Raises:
        PlanError: there is no such device.
        MergetoolError: as :func:`mergetool.execute.prepare.prepare` and
            :func:`mergetool.execute.merged.merged_weights`.
    """
    asking = any(wanted(job) or job.corrected is not None for job in jobs)
    some = plan if asking or any(job.facts for job in jobs) else replace(plan, jobs=jobs)
    turned = plan.recipe.align is not None
    ahead = prepare(some, trust_code=trust_code, device=device) if asking or turned else Prepared(some)
    with merged_weights(some, ahead, device) as weights:
        yield weights


def _complete(plan: Plan, output: Path, provenance: Mapping[str, Any]) -> bool:
    """Whether a folder is this plan's result, as far as can be told without reading it."""
    sizes = {shard.file: shard.nbytes for shard in plan.shards}
    held = {path.name: path.stat().st_size for path in output.iterdir() if path.name in sizes}
    return held == sizes and provenance.get("run") == run_digest(plan)


def room(plan: Plan, output: Path, stage: Staging) -> None:
    """See that the disk has room for what is not laid out yet.

    Raises:
        RunError: it has not.
    """
    laid = sum(
        (stage.path / shard.file).stat().st_blocks * 512 for shard in plan.shards if (stage.path / shard.file).exists()
    )
    free = shutil.disk_usage(stage.path).free
    if free < plan.bytes_written - laid:
        what = f"the disk has {free / 1e9:.2f} GB free and the output takes {plan.bytes_written / 1e9:.2f} GB"
        raise RunError(what, str(output.parent), "make room or choose another output")


def findings(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What was found while running that a user should know."""
    notes = [
        f"{name} differs in {', '.join(outcome.unequal)}; it holds no floating numbers, so it was copied"
        for name, outcome in outcomes.items()
        if outcome.unequal
    ]
    return notes + [f"{name}{_NOT_FINITE}{_counts(outcome)}" for name, outcome in outcomes.items() if outcome.bad]


def _counts(outcome: Outcome) -> str:
    return ", ".join(f"{count} in {where}" for where, count in outcome.bad.items())
