"""Build a plan: open the sources' headers, make every job, lay out every shard, and say all that is wrong at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergetool.checkpoint.layout import is_tokenizer
from mergetool.errors import CheckpointError, OutputRefused, PlanError, Problem, RecipeError
from mergetool.plan.correction import correction, in_weights
from mergetool.plan.digest import digest
from mergetool.plan.faults import Faults
from mergetool.plan.jobs import JobMaker
from mergetool.plan.memory import fit
from mergetool.plan.notes import notes
from mergetool.plan.output import refusal
from mergetool.plan.sources import open_sources, references
from mergetool.plan.stages import stages, unmet
from mergetool.plan.work import Plan, Route, Source
from mergetool.recipe import Recipe, read
from mergetool.recipe.files import absent, fingerprints
from mergetool.storage.shards import shard

SHARD_SIZE = 5_000_000_000
"""Bytes of data in one output file, at most: what the Hub's own tools take."""


def build(
    recipe: Recipe,
    *,
    memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Plan:
    """Turn a recipe into a plan; only headers and configs are read.

    >>> plan = build(load("examples/linear.yaml"))
    >>> len(plan.jobs), plan.bytes_written
    (38, 2103552)

    Args:
        recipe: what :func:`mergetool.load` returned.
        memory: the budget of anonymous memory in bytes; by default a small fraction of the machine's.
        shard_size: the most bytes of data in one output file.
        workers: threads; by default one for each core.
        output: the output folder; by default the recipe's own.

    Raises:
        RecipeError: a filter or rule matches nothing, or a parameter is missing or wrong for some tensor.
        CheckpointError: a model cannot be found or read, lacks a tensor, or has one of another shape.
        PlanError: the models do not fit together, the budget is too small, or there is no such number of workers.
        OutputRefused: the output overlaps with a source, or is no folder.
    """
    _refuse_unloaded(recipe)
    faults = Faults()
    plan = _build(recipe, faults, memory, shard_size, workers, output)
    faults.check()
    assert plan is not None
    return plan


def check(
    path: str | os.PathLike[str],
    overrides: str | Sequence[str] = (),
    *,
    memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Plan:
    """Load a recipe and build its plan, with every problem of the text *and* of its models in one error.

    Args:
        path: the recipe.
        overrides: ``key.path=value`` changes to it; one, or several.
        memory: as for :func:`build`.
        shard_size: as for :func:`build`.
        workers: as for :func:`build`.
        output: as for :func:`build`.

    Raises:
        MergetoolError: as :func:`mergetool.load` and :func:`build`.
    """
    faults = Faults()
    recipe, problems = read(Path(path), overrides)
    faults.add(RecipeError, problems)
    plan = None if recipe is None else _build(recipe, faults, memory, shard_size, workers, output)
    faults.check()
    assert plan is not None
    return plan


def _refuse_unloaded(thing: object) -> None:
    """Say which verb comes first, to somebody who builds what was not loaded."""
    if not isinstance(thing, Recipe):
        text = isinstance(thing, str | bytes | os.PathLike)
        found = "a path or a text" if text else "a plan" if isinstance(thing, Plan) else f"a {type(thing).__name__}"
        fix = "load it first: `build(load(…))`" if text else "give what `load` returned"
        raise RecipeError(f"`build` takes a recipe that was loaded, not {found}", fix=fix)


def _build(
    recipe: Recipe,
    faults: Faults,
    memory: int | None,
    shard_size: int,
    workers: int | None,
    output: str | os.PathLike[str] | None,
) -> Plan | None:
    if workers is not None and workers < 1:
        faults.add(PlanError, [Problem(f"there are no {workers} workers", "--workers", "give 1 or more")])
    sound = not faults  # what the text has wrong was dropped from the recipe, and may be all that is missing below
    faults.add(RecipeError, absent(recipe))
    target = _output(recipe, output)
    sources, problems = open_sources(recipe)
    faults.add(CheckpointError, problems)
    labels = [source.label for source in sources]
    if target is not None and (problem := refusal(target, sources)) is not None:
        faults.add(OutputRefused, [problem])
    first = recipe.base_model or recipe.models[0].reference
    if first not in labels:  # nothing to hold the others against
        return None
    lender = labels.index(first)
    tokenizer = _tokenizer(recipe, sources, lender, faults)
    maker = JobMaker(recipe, sources, lender, faults)
    jobs = maker.make()
    if sound and len(sources) == len(references(recipe)):
        faults.add(RecipeError, unmet(recipe, jobs))
    if not jobs and not faults:
        faults.add(RecipeError, [Problem("nothing is left to write", recipe.where("rules"))])
    corrected = None if faults else correction(recipe, sources, lender, jobs, maker.routes, faults)
    if faults:
        return None
    if corrected is not None and in_weights(recipe):
        jobs = corrected.jobs
    try:
        fitted = fit(jobs if corrected is None else corrected.jobs, memory, workers)
    except PlanError as error:
        faults.add(PlanError, error.problems)
        return None
    stem = _stem(sources[lender].checkpoint.weight_files)
    data = fingerprints(recipe)
    shards = shard(((job.name, job.dtype, job.shape) for job in jobs), shard_size, stem)
    return Plan(
        recipe=recipe,
        sources=sources,
        lender=lender,
        tokenizer=tokenizer,
        jobs=jobs,
        shards=shards,
        stages=stages(recipe, sources, jobs, fitted, corrected),
        routes=(*maker.routes, *_lent(recipe, sources, maker.routes)),
        memory=fitted,
        digest=digest(recipe, sources, shards, data),
        output=target,
        notes=(*notes(recipe, sources, lender), *(corrected.outputs.unheld if corrected is not None else ())),
        correction=corrected,
        data=data,
    )


def _tokenizer(recipe: Recipe, sources: Sequence[Source], lender: int, faults: Faults) -> int:
    """The source whose tokenizer the output takes; a fault where it was asked for one that it does not have."""
    asked = recipe.tokenizer_source
    if asked is None:
        return lender
    labels = [source.label for source in sources]
    found = lender if asked == "base" else labels.index(asked) if asked in labels else None
    if found is None:  # it could not be opened, and was reported
        return lender
    if not any(is_tokenizer(name) for name in sources[found].checkpoint.files):
        able = [s.label for s in sources if any(is_tokenizer(name) for name in s.checkpoint.files)]
        fix = f"name {' or '.join(able)}" if able else "remove the key: no model here has a tokenizer"
        what = f"{labels[found]} has no tokenizer files"
        faults.add(PlanError, [Problem(what, recipe.where("tokenizer_source"), fix)])
    return found


def _lent(recipe: Recipe, sources: Sequence[Source], routes: Iterable[Route]) -> list[Route]:
    """The tensors that no job touches: those of a base that is there for its config and tokenizer."""
    routed = {(route.source, route.tensor) for route in routes}
    return [
        Route(i, name, "lends its files", "the method takes no base")
        for i, source in enumerate(sources)
        for name in source.checkpoint.tensors
        if (i, name) not in routed
    ]


def _stem(files: Sequence[str]) -> str:
    """What the lender calls its weight files, without number and suffix."""
    name = Path(files[0]).name if files else "model.safetensors"
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", name) or "model"


def _output(recipe: Recipe, output: str | os.PathLike[str] | None) -> Path | None:
    if output is not None:
        return Path(output)
    if recipe.output is None:
        return None
    return (recipe.folder or Path()) / recipe.output
