"""Build a plan: open the sources' headers, make every job, lay out every shard, and say all that is wrong at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mergetool.errors import CheckpointError, PlanError, Problem, RecipeError
from mergetool.plan.faults import Faults
from mergetool.plan.jobs import JobMaker
from mergetool.plan.memory import fit
from mergetool.plan.sources import open_sources
from mergetool.plan.work import Job, Plan, Route, Source, Stage
from mergetool.recipe import Recipe, read
from mergetool.storage.shards import Shard, shard

SHARD_SIZE = 5_000_000_000
"""Bytes of data in one output file, at most: what the Hub's own tools take."""
FORMAT = 1
"""Raised when the same recipe and sources begin to give other bytes."""


def build(
    recipe: Recipe,
    *,
    memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    output: Path | None = None,
) -> Plan:
    """Turn a recipe into a plan; only headers and configs are read.

    >>> plan = build(load("examples/linear.yaml"))
    >>> plan.bytes_written
    1927512

    Args:
        recipe: what :func:`mergetool.load` returned.
        memory: the budget of anonymous memory in bytes; by default a small fraction of the machine's.
        shard_size: the most bytes of data in one output file.
        workers: threads; by default one more than there are cores.
        output: the output folder; by default the recipe's own.

    Raises:
        RecipeError: a filter or rule matches nothing, or a parameter is missing or wrong for some tensor.
        CheckpointError: a model cannot be found or read, lacks a tensor, or has one of another shape.
        PlanError: the models do not fit together, or the budget is too small.
    """
    faults = Faults()
    plan = _build(recipe, faults, memory, shard_size, workers, output)
    faults.check()
    assert plan is not None
    return plan


def check(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    memory: int | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    output: Path | None = None,
) -> Plan:
    """Load a recipe and build its plan, with every problem of the text *and* of its models in one error.

    Args:
        path: the recipe.
        overrides: ``key.path=value`` changes to it.
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


def _build(
    recipe: Recipe, faults: Faults, memory: int | None, shard_size: int, workers: int | None, output: Path | None
) -> Plan | None:
    sources, problems = open_sources(recipe)
    faults.add(CheckpointError, problems)
    labels = [source.label for source in sources]
    lender = recipe.base_model or recipe.models[0].reference
    if lender not in labels:  # nothing to hold the others against
        return None
    donor = labels.index(lender)
    tokenizer = recipe.tokenizer_source
    maker = JobMaker(recipe, sources, donor, faults)
    jobs = maker.make()
    if not jobs and not faults:
        faults.add(RecipeError, [Problem("nothing is left to write", recipe.where("rules"))])
    if faults:
        return None
    try:
        fitted = fit(jobs, memory, workers)
    except PlanError as error:
        faults.add(PlanError, error.problems)
        return None
    stem = _stem(sources[donor].checkpoint.weight_files)
    shards = shard(((job.name, job.dtype, job.shape) for job in jobs), shard_size, stem)
    return Plan(
        recipe=recipe,
        sources=sources,
        donor=donor,
        tokenizer=donor if tokenizer in (None, "base") else labels.index(tokenizer),
        jobs=jobs,
        shards=shards,
        stages=_stages(jobs),
        routes=(*maker.routes, *_lent(recipe, sources, maker.routes)),
        memory=fitted,
        digest=digest(recipe, sources, shards),
        output=_output(recipe, output),
        notes=_notes(recipe, sources, donor),
    )


def _stages(jobs: Sequence[Job]) -> tuple[Stage, ...]:
    measured = tuple(i for i, job in enumerate(jobs) if job.facts)
    ahead = (Stage("measure", measured, 2),) if measured else ()
    return (*ahead, Stage("merge", tuple(range(len(jobs))), 1))


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
    """What the donor calls its weight files, without number and suffix."""
    name = Path(files[0]).name if files else "model.safetensors"
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", name) or "model"


def _output(recipe: Recipe, output: Path | None) -> Path | None:
    if output is not None:
        return output
    if recipe.output is None:
        return None
    return (recipe.folder or Path()) / recipe.output


def _notes(recipe: Recipe, sources: Sequence[Source], donor: int) -> tuple[str, ...]:
    families = {source.anatomy.family for source in sources}
    notes = []
    if "generic" in families:
        notes.append("the architecture is not a listed one: layers and parts are inferred from names")
    types = {str(s.checkpoint.config["model_type"]) for s in sources if "model_type" in s.checkpoint.config}
    if len(types) > 1:
        notes.append(f"the sources' configs name different model types ({', '.join(sorted(types))})")
    template = "chat_template.jinja"
    with_template = [s.label for s in sources if template in s.checkpoint.files]
    if with_template and template not in sources[donor].checkpoint.files and recipe.tokenizer_source in (None, "base"):
        notes.append(f"{with_template[0]} has a chat template and the output will not: see `tokenizer_source`")
    return tuple(notes)


def digest(recipe: Recipe, sources: Sequence[Source], shards: Sequence[Shard]) -> str:
    """A hash of what decides the output's bytes: recipe, sources' identities, layout."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe.canonical(),
        "sources": [(source.label, _identity(source)) for source in sources],
        "shards": [(s.file, hashlib.sha256(s.preamble).hexdigest()) for s in shards],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(source: Source) -> object:
    """What tells a source from others: the commit, or each local file's size and time, the layout and the config.

    The config decides depths and ties, and so the weights; the other files are carried into the output.
    """
    checkpoint = source.checkpoint
    if checkpoint.commit is not None:
        return checkpoint.commit
    stats = [(name, os.stat(checkpoint.file(name))) for name in (*checkpoint.weight_files, *checkpoint.files)]
    layout = [(t.name, t.dtype.name, t.shape, t.file, t.start) for t in checkpoint.tensors.values()]
    hashed = hashlib.sha256(json.dumps([layout, checkpoint.config], sort_keys=True).encode()).hexdigest()
    return [[(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats], hashed]
