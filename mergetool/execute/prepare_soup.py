"""Which sources are averaged: means of some of them tried on data, the choice and every score kept as facts.

A mean is tried as it would be written: made from the plan's own jobs, rounded to the dtype that is stored, with what
rules make of other tensors. So the soup that is written has the loss that it was chosen for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.errors import NonFinite
from mergetool.execute.calibration import Samples
from mergetool.execute.fact_folder import Facts
from mergetool.execute.fact_making import Making, facts_folder
from mergetool.execute.forward.scores import score
from mergetool.execute.forward.spread import loaded
from mergetool.execute.merged import merged_weights
from mergetool.execute.prepare_data import SourceData
from mergetool.execute.prepare_models import Sources
from mergetool.execute.prepared import Prepared
from mergetool.execute.progress import Progress
from mergetool.execute.soup_facts import add_choice, name_of, read_tried
from mergetool.facts.soup import Members, Soup, greedy, reads
from mergetool.plan import Job, Plan
from mergetool.plan.stages import CHOSEN, merged, scored, wanted
from mergetool.recipe.data import Evaluate
from mergetool.storage.dtypes import dtype

_LOGITS = 1 << 28  # of one forward pass, at most; a large vocabulary lowers the batch
_ROWS = 8


def choose(
    sources: Sources, data: SourceData, known: Prepared, progress: Progress, root: Path | None
) -> tuple[Prepared, tuple[str, ...]]:
    """Choose the sources of a soup, or find what was chosen before.

    Args:
        sources: the plan's sources.
        data: their data.
        known: all else that is known ahead of the jobs.
        progress: is told how many bytes of weights are read.
        root: where folders of facts are kept; the cache by default.

    Returns:
        What is known, with how much each source counts; and what the user should know.

    Raises:
        PlanError: the data cannot be read, or do not suit the models.
        CheckpointError: a model cannot be read or run.
        NonFinite: a source, or what it predicts, is not finite.
        RunError: the disk is full or fails.
    """
    tasting = Tasting.of(sources, data, known)
    with facts_folder(CHOSEN, tasting.made_of, root, ", ".join(tasting.labels)) as found:
        if isinstance(found, Making):
            found = _made(tasting, found, progress)
        soup = read_tried(found).soup
    notes = [_told(soup, tasting)]
    if sources.plan.recipe.correct is not None:
        notes.append("the soup was chosen among means that are not corrected")
    shares = {source: float(i in soup.members) for i, source in enumerate(tasting.own)}
    return replace(known, shares=shares, soup=found), tuple(notes)


@dataclass(frozen=True)
class Tasting:
    """What is tried, and on what.

    Attributes:
        sources: the plan's sources.
        known: all that is known ahead of the jobs but the choice.
        own: the sources that may be in the soup, by their place in the plan.
        settings: how they are scored.
        samples: on what.
    """

    sources: Sources
    known: Prepared
    own: tuple[int, ...]
    settings: Evaluate
    samples: tuple[Samples, ...]

    @classmethod
    def of(cls, sources: Sources, data: SourceData, known: Prepared) -> Tasting:
        """What a plan asks for."""
        plan = sources.plan
        own = next(merged(job) for job in plan.jobs if CHOSEN in wanted(job).values())
        samples = data.named(scored(plan.recipe), plan.tokenizer, labels=True)
        return cls(sources, known, own, plan.recipe.evaluate or Evaluate(), samples)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the recipe calls the models."""
        return self.sources.labels(self.own)

    @property
    def made_of(self) -> dict[str, Any]:
        """What decides the scores: models, data, and all that the plan's jobs make of the rest of a model."""
        plan = self.candidate(range(len(self.own)))
        others = [job for job in plan.jobs if CHOSEN not in wanted(job).values()]
        return {
            "models": [self.sources.made_of(source) for source in self.own],
            "lender": self.sources.made_of(plan.lender),
            "data": [samples.digest for samples in self.samples],
            "metric": self.settings.metric,
            "dtypes": sorted({(job.name, job.dtype.name) for job in plan.jobs if CHOSEN in wanted(job).values()}),
            "others": self.sources.made_by(others, self.known),
        }

    def candidate(self, members: Sequence[int]) -> Plan:
        """The plan of the mean of some of the models."""
        plan, chosen = self.sources.plan, {self.own[i] for i in members}
        jobs = tuple(_restricted(job, chosen, self.settings.dtype) for job in plan.jobs)
        return replace(plan, jobs=jobs)

    def scores(self, members: Members) -> list[float]:
        """How the mean of some of the models does on each of the data.

        Raises:
            NonFinite: it, or what it predicts, is not finite.
            PlanError: it cannot be run on the data.
        """
        plan = self.candidate(members)
        known = replace(self.known, plan=plan, shares=dict.fromkeys((self.own[i] for i in members), 1.0))
        named = " and ".join(self.labels[i] for i in members)
        config = plan.sources[plan.lender].checkpoint.config
        with merged_weights(plan, known, self.sources.device) as weights:
            model = self.sources.merged(weights, named if len(members) == 1 else f"the mean of {named}")
            with loaded(model):
                metric = self.settings.metric
                return [score(model, each.batches(_rows(config, each)), metric) for each in self.samples]


def _restricted(job: Job, chosen: set[int], asked: str | None) -> Job:
    """A job that reads only what is in the mean, and rounds to the dtype that is asked for."""
    if job.method and asked is not None and not job.part.keep_dtype:
        job = replace(job, dtype=dtype(asked))
    if CHOSEN not in wanted(job).values():
        return job
    return replace(job, reads=tuple(read for read in job.reads if read.source in chosen))


def _rows(config: Mapping[str, Any], samples: Samples) -> int:
    """So many texts in one forward pass that their logits do not fill the memory."""
    if samples.padding is None:
        return _ROWS
    text = config.get("text_config")
    size = int((text if isinstance(text, Mapping) else config).get("vocab_size", 1))
    longest = max(len(part["input_ids"][0]) for part in samples.parts)
    return max(1, min(_ROWS, _LOGITS // (longest * size)))


def _made(tasting: Tasting, found: Making, progress: Progress) -> Facts:
    """Try what has not been tried before the last kill, and write the choice."""
    nbytes = max(
        sum(t.nbytes for t in tasting.sources.plan.sources[i].checkpoint.tensors.values()) for i in tasting.own
    )
    metric = tasting.settings.metric
    sign = -1.0 if metric == "accuracy" else 1.0

    def loss(members: Members) -> float:
        name = name_of(members)
        if name not in found.steps:
            found.add(name, {f"{name}:{metric}": np.array(_scores(tasting, members), np.float64)}, {})
        progress.advance(len(members) * nbytes)
        return sign * float(found.done.get(name, metric).mean())

    progress.start(reads(len(tasting.own)) * nbytes, "evaluate")
    try:
        soup = greedy(len(tasting.own), loss)
    except NonFinite:
        found.discard()
        raise
    finally:
        progress.close()
    add_choice(soup, found)
    return found.finish()


def _scores(tasting: Tasting, members: Members) -> list[float]:
    """The scores of a mean; one that overflows is worse than any, but a model that does so by itself is broken."""
    try:
        return tasting.scores(members)
    except NonFinite:
        if len(members) == 1:
            raise
        return [np.nan] * len(tasting.samples)


def _told(soup: Soup, tasting: Tasting) -> str:
    labels, metric = tasting.labels, tasting.settings.metric
    best, score = labels[soup.best], soup.tried[soup.members]
    out = [label for i, label in enumerate(labels) if i not in soup.members]
    left = f"; left out: {', '.join(out)}" if out else ""
    if len(soup.members) == 1:
        return f"the soup is {best} alone, {metric} {score:.4f}: no mean with another does as well{left}"
    names = ", ".join(labels[i] for i in soup.members)
    alone = soup.tried[soup.best,]
    return f"the soup is the mean of {names}: {metric} {score:.4f}, of {best} alone {alone:.4f}{left}"
