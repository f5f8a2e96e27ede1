"""What a plan is known by: a hash of all that decides the output's bytes, with and without a look at weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mergetool.checkpoint.identity import layout, size_and_time, some_bytes
from mergetool.errors import SourceChanged
from mergetool.plan.work import Plan, Source
from mergetool.recipe import Recipe
from mergetool.recipe.files import fingerprints
from mergetool.storage.shards import Shard

FORMAT = 2
"""Raised when the same recipe and sources begin to give other bytes."""
_FIX = "plan again, and leave the sources alone while they are merged"


def digest(
    recipe: Recipe,
    sources: Sequence[Source],
    shards: Sequence[Shard],
    data: Mapping[str, str] | None = None,
    task: str = "",
) -> str:
    """A hash of what decides the output's bytes: recipe, sources' identities, calibration data, layout, task.

    It is made without a look at weights, as all of a plan is; see :func:`run_digest`.

    Args:
        recipe: the recipe.
        sources: its models, opened.
        shards: the output's files.
        data: the fingerprints of the calibration data, where they were just taken.
        task: whose model it is, where each task has one of its own.

    Raises:
        CheckpointError: a file of the calibration cannot be opened.
        RunError: the disk fails.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe.canonical(),
        "sources": [(source.label, _identity(source)) for source in sources],
        "shards": [(s.file, hashlib.sha256(s.preamble).hexdigest()) for s in shards],
    }
    if recipe.calibration is not None:
        content["data"] = list((fingerprints(recipe) if data is None else data).values())
    if task:
        content["task"] = task
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_digest(plan: Plan) -> str:
    """What a run and its result are known by: the plan's digest, and some bytes of every tensor of local sources.

    So nobody goes on with what was begun with another model of the same size, time and layout.

    Raises:
        SourceChanged: a source's file is not there any more.
        CheckpointError: it cannot be opened, or ends early.
    """
    with _there():
        looks = [some_bytes(s.checkpoint) for s in plan.sources if s.checkpoint.commit is None]
    return hashlib.sha256(json.dumps([plan.digest, looks]).encode()).hexdigest()


def unchanged(plan: Plan) -> None:
    """See that the sources are what was planned with, as far as can be told without a look at weights.

    Raises:
        SourceChanged: a source's file is another one, or is not there any more.
    """
    with _there():
        same = digest(plan.recipe, plan.sources, plan.shards, task=plan.task) == plan.digest
    if not same:
        raise SourceChanged("a source's file changed after planning", fix=_FIX)


@contextmanager
def _there() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"a source's file cannot be read any more: {error.strerror}"
        raise SourceChanged(what, str(error.filename), _FIX) from error


def _identity(source: Source) -> object:
    """What tells a source from others: the commit, or each local file's size and time, the layout and the config.

    The config decides depths and ties, and so the weights; the other files are carried into the output.
    """
    checkpoint = source.checkpoint
    if checkpoint.commit is not None:
        return checkpoint.commit
    files = (*checkpoint.weight_files, *checkpoint.files)
    return [[size_and_time(checkpoint, name) for name in files], layout(checkpoint)]
