"""What `correct` comes to for a recipe's models: which outputs, towards what, on which data, and what is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from mergetool.anatomy import anatomy
from mergetool.errors import PlanError, Problem
from mergetool.facts.outputs import Outputs, outputs, private_heads
from mergetool.methods import METHODS
from mergetool.plan.faults import Faults, listed
from mergetool.plan.sources import place
from mergetool.plan.work import Correction, Job, Plan, Route, Source, Task
from mergetool.recipe import Recipe
from mergetool.recipe.data import Correct, Data

CORRECTIONS, HEADS = "corrections", "heads"
"""Where in a model folder the files of `fold: side_file` and `fold: head` are."""
SHIFTS = "holds the shift of a correction"
"""Why there is a tensor in the output that no source has."""


def correction(
    recipe: Recipe, sources: Sequence[Source], lender: int, jobs: Sequence[Job], routes: Sequence[Route], faults: Faults
) -> Correction | None:
    """What is to be corrected in the merged model; what stands against it is left in ``faults``.

    Args:
        recipe: the recipe.
        sources: its opened models.
        lender: which of them lends the output its config.
        jobs: all tensors of the merged model.
        routes: where every source tensor goes.
        faults: takes what is wrong.
    """
    correct = recipe.correct
    if correct is None or recipe.calibration is None:
        return None
    method = recipe.where("correct", "method")
    config = sources[lender].checkpoint.config
    merged = {job.name: job for job in jobs}
    shapes = {job.name: job.shape for job in jobs}
    parts = anatomy(config, shapes)
    if correct.method == "tact" and correct.fold == "head":
        found = private_heads(parts, config, shapes, correct.statistic)
    else:
        found = outputs(parts, config, shapes, correct.scope, correct.statistic)
    kept = tuple(output for output in found.outputs if merged[output.weight].method)
    found = replace(found, outputs=kept, batch_norms=found.batch_norms if correct.scope == "all" else ())
    faults.add(PlanError, chain(_dropped(recipe, sources, lender, routes), _nothing(found, correct, method)))
    tasks = tuple(_tasks(recipe, correct, [source.label for source in sources]))
    if correct.fold == "head":
        faults.add(PlanError, _headless(recipe, sources, tasks, found))
    return Correction(found, tasks, _corrected(found, jobs, config))


def _dropped(recipe: Recipe, sources: Sequence[Source], lender: int, routes: Sequence[Route]) -> Iterator[Problem]:
    """A model that lacks a weight cannot be run, and so not be measured."""
    parts = sources[lender].anatomy.parts
    names = [
        r.tensor for r in routes if r.fate == "dropped" and r.source == lender and parts[r.tensor].role != "buffer"
    ]
    if names:
        rule = next(rule for rule in recipe.rules if rule.drop)
        what = f"`correct` runs the merged model, which lacks {listed(names)} when a rule drops it"
        yield Problem(what, recipe.where(*rule.path, "drop"), "keep them, or merge without `correct`")


def _nothing(found: Outputs, correct: Correct, place: str) -> Iterator[Problem]:
    if found.outputs or found.batch_norms:
        return
    if correct.fold == "head":
        what = "`fold: head` needs a head of each task's own, which reads the model's last state, and there is none"
        what += ": a head over the vocabulary is shared by all tasks" if found.unheld else ""
        yield Problem(what, place, "use `fold: per_task` or `fold: side_file`")
    else:
        yield Problem(found.unheld[0], place, "merge without `correct`, or try the other `correct.scope`")


def _headless(recipe: Recipe, sources: Sequence[Source], tasks: Sequence[Task], found: Outputs) -> Iterator[Problem]:
    """A correction goes into the head of the task's own model, whatever a rule makes of the merged one's."""
    for task in tasks:
        assert task.source is not None  # a task has a model
        source = sources[task.source]
        missing = [name for output in found.outputs for name in output.own if name not in source.checkpoint.tensors]
        if missing:
            what = f"{source.label} has no {listed(missing)}, where `fold: head` puts the correction of `{task.name}`"
            fix = "use `fold: per_task` or `fold: side_file`, or name the other tasks under `correct.data`"
            yield Problem(what, place(recipe, source.label), fix)


def _tasks(recipe: Recipe, correct: Correct, labels: Sequence[str]) -> Iterator[Task]:
    """REPAIR's one correction on all data together, or one for each task on its own."""
    assert recipe.calibration is not None
    if correct.method == "repair":
        yield Task("", tuple(_few(data, correct) for data in recipe.calibration.named(correct.data)))
        return
    owners = {source.data: source.reference for source in recipe.models if source.data is not None}
    for name in correct.data or owners:
        if name in owners and owners[name] in labels:
            (data,) = recipe.calibration.named((name,))
            yield Task(name, (_few(data, correct),), labels.index(owners[name]))


def _few(data: Data, correct: Correct) -> Data:
    return data if correct.samples is None else replace(data, samples=min(data.samples, correct.samples))


def _corrected(found: Outputs, jobs: Sequence[Job], config: Mapping[str, object]) -> tuple[Job, ...]:
    """The jobs of the corrected model: those that are edited are marked, and behind a weight stands its new bias."""
    axes = {output.weight: output.axis for output in found.outputs}
    axes |= {output.bias: 0 for output in found.outputs if output.bias}
    axes |= {f"{norm}.{name}": 0 for norm in found.batch_norms for name in ("running_mean", "running_var")}
    shapes = {job.name: job.shape for job in jobs} | {name: (size,) for name, size in found.added.items()}
    parts = anatomy({**config, **found.config}, shapes).parts
    made = []
    for job in jobs:
        made.append(replace(job, corrected=axes.get(job.name)))
        bias = f"{job.name.removesuffix('weight')}bias"
        if bias in found.added:
            shape = (found.added[bias],)
            made.append(Job(bias, shape, job.dtype, parts[bias], "", (), reason=SHIFTS, corrected=0))
    return tuple(made)


def in_weights(recipe: Recipe) -> bool:
    """Whether a recipe's correction goes into the weights that are written, rather than into files beside them."""
    return recipe.correct is not None and (recipe.correct.method == "repair" or recipe.correct.fold == "per_task")


def uncorrected(plan: Plan) -> Plan:
    """The plan of the merge as it is, without what a correction adds to it: what is known ahead of it is about that."""
    return replace(plan, jobs=tuple(replace(job, corrected=None) for job in plan.jobs if not job.added))


def shares(job: Job) -> tuple[tuple[int, float], ...]:
    """Whose statistics REPAIR aims at for what a tensor makes, and with which share: (place in the plan, share).

    The sources that are merged into it: by the method's `weight`, where it has one for each source and none is below
    0, else all alike; of an interpolation between two ends by how far it goes.
    """
    if "t" in job.parameters and len(job.reads) == 2:
        t = float(job.parameters["t"])
        return (job.reads[0].source, 1.0 - t), (job.reads[1].source, t)
    read = [read.source for read in job.reads[int(METHODS[job.method].base == "required") :]]
    weights = job.parameters.get("weight")
    if not isinstance(weights, tuple) or len(weights) != len(read) or min(weights) < 0 or not sum(weights):
        weights = (1.0,) * len(read)
    return tuple((source, float(weight) / sum(weights)) for source, weight in zip(read, weights, strict=True))
