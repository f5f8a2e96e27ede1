"""Whether tensors of a model folder come out the same when they are made again from the sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.checkpoint import hub
from mergetool.errors import MergetoolError
from mergetool.execute.merged import Merged
from mergetool.execute.run import made_again
from mergetool.plan import Job, Plan, build
from mergetool.plan.tasks import of_task
from mergetool.publish import RECIPE, header_digest, read_local
from mergetool.publish.loadable import CannotTell, first_line
from mergetool.publish.privacy import Privacy
from mergetool.recipe import Recipe, load
from mergetool.storage.header import Entry, Header
from mergetool.storage.reader import Reader


def again(
    folder: Path,
    record: Mapping[str, Any],
    headers: Mapping[str, Header],
    sample: int,
    device: str,
    recipe_folder: Path | None,
    trust_code: bool,
) -> tuple[list[str], str]:
    """Make some tensors of a model folder again.

    Args:
        folder: the model folder.
        record: its provenance.
        headers: of its weight files.
        sample: how many tensors, at most.
        device: where they are made.
        recipe_folder: where the recipe's relative paths start from; by default where the recipe lay.
        trust_code: whether the recipe's adapter may be run.

    Returns:
        What is wrong; and what to say where nothing is.

    Raises:
        CannotTell: the tensors cannot be made again, as far as is known from here.
    """
    if sample < 1:
        raise CannotTell("no tensor is to be made again")
    plan = _plan(folder, record, recipe_folder, trust_code)
    held = {name: (file, entry) for file, header in headers.items() for name, entry in header.entries.items()}
    jobs = tuple(job for job in chosen(plan.jobs, sample) if job.name in held)
    if absent := next(filter(None, (_absent(plan, job) for job in jobs)), ""):
        raise CannotTell(absent)
    with made_again(plan, jobs, device, trust_code) as weights:
        places = [(job, folder / held[job.name][0], held[job.name][1]) for job in jobs]
        wrong = list(filter(None, (_differs(weights, *place) for place in places)))
    return wrong, f"{len(jobs)} of {len(plan.jobs)} tensors made again, the same bytes"


def _plan(folder: Path, record: Mapping[str, Any], recipe_folder: Path | None, trust_code: bool) -> Plan:
    """The plan that the folder was made by; CannotTell where there is none, or it has other sources or data."""
    try:
        recipe = _recipe(folder, record, recipe_folder)
        if recipe is None:
            raise CannotTell("nothing here says where the sources are; give --recipe-folder")
        plan = build(recipe)
        plan = of_task(plan, record["task"]) if record.get("task") else plan
    except (OSError, MergetoolError) as error:
        raise CannotTell(f"the plan cannot be built again: {first_line(error)}") from error
    if changed := _changed(plan, record):
        raise CannotTell(f"not the sources that it was made from: {changed}")
    if changed := _other_data(plan, record):
        raise CannotTell(f"not the data that it was made with: {changed}")
    if recipe.calibration is not None and recipe.calibration.adapter is not None and not trust_code:
        fix = "read it, and add --trust-code if you trust it"
        raise CannotTell(f"the recipe's adapter {recipe.calibration.adapter} is code; {fix}")
    return plan


def _differs(weights: Merged, job: Job, file: Path, entry: Entry) -> str:
    """In what a tensor on disk is not what its job makes; nothing where it is."""
    if (entry.dtype, entry.shape) != (job.dtype, job.shape):
        is_, said = (f"{x.dtype.name} {list(x.shape)}" for x in (entry, job))
        return f"`{job.name}` is {is_} and comes out as {said}"
    result = weights.raw(job)
    with Reader(file) as reader:
        stored = reader.read(entry)
    same = np.array_equal(stored.view(np.uint8), np.asarray(result).view(np.uint8))
    return "" if same else f"`{job.name}` comes out otherwise"


def _recipe(folder: Path, record: Mapping[str, Any], recipe_folder: Path | None) -> Recipe | None:
    """The recipe to make tensors again by; None where it would name local sources without their place."""
    local = read_local(folder)
    if local is not None:
        return replace(load(local.text.encode()), folder=recipe_folder or local.recipe_folder)
    if recipe_folder is None and not all(source.get("repo") for source in record["sources"]):
        return None
    return replace(load((folder / RECIPE).read_bytes()), folder=recipe_folder)


def _changed(plan: Plan, record: Mapping[str, Any]) -> str:
    """The first source whose headers or commit are not those on record."""
    names = Privacy.of(plan).names
    for source, stated in zip(plan.sources, record["sources"], strict=False):
        found = {name: header_digest(header) for name, header in source.checkpoint.headers.items()}
        said = {name: weights["header"] for name, weights in stated["weights"].items()}
        if (names[source.label], source.checkpoint.commit, found) != (stated["label"], stated["commit"], said):
            return names[source.label]
    return ""


def _other_data(plan: Plan, record: Mapping[str, Any]) -> str:
    """The first data whose content or settings are not those on record."""
    stated = record.get("data", plan.data)
    return next((name for name, found in plan.data.items() if stated.get(name) != found), "")


def _absent(plan: Plan, job: Job) -> str:
    """Which source of a job would have to be downloaded first."""
    for read in (*job.reads, *job.compare):
        source = plan.sources[read.source].checkpoint
        if source.repo and source.commit and not hub.cached_file(source.repo, source.commit, read.tensor.file):
            return f"{source.label} is not in the local cache"
    return ""


def chosen(jobs: Sequence[Job], count: int) -> list[Job]:
    """Some jobs, the same every time: the first, the largest, and others at equal distances over methods and sizes."""
    if not jobs or count < 1:
        return []
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i].method, jobs[i].size, i))
    largest = max(range(len(jobs)), key=lambda i: (jobs[i].bytes_written, -i))
    spread = [order[round(k * (len(order) - 1) / max(1, count - 1))] for k in range(count)]
    return [jobs[i] for i in list(dict.fromkeys((0, largest, *spread)))[:count]]
