"""REPAIR and TACT: what a merged model's tensors need so that its activations have the moments they should have.

The merged model runs before it is written, its weights made in memory from the plan's jobs. First its moments are
measured as it is, and those that are aimed at; then outputs are corrected one after the other (:mod:`.correct_steps`).
What is found are the edits of tensors, kept as facts: the merge applies them before it rounds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mergetool.execute.correct_facts import arrays_of, edits_of
from mergetool.execute.correct_report import SPREAD, Spread, after, clamped, spreads, summary
from mergetool.execute.correct_steps import Sequential, Settings
from mergetool.execute.fact_folder import Facts
from mergetool.execute.fact_making import Making, facts_folder
from mergetool.execute.forward.model import Model
from mergetool.execute.merged import merged_weights
from mergetool.execute.prepare_data import SourceData
from mergetool.execute.prepare_models import Sources
from mergetool.execute.prepared import Prepared
from mergetool.execute.progress import Progress
from mergetool.execute.record import nothing_kept, record
from mergetool.facts.correction import Edit, Moments, goal
from mergetool.plan.correction import shares
from mergetool.plan.faults import listed
from mergetool.plan.stages import CHOSEN, merged, wanted
from mergetool.plan.work import Correction, Job, Task
from mergetool.storage.writer import atomic_write

KIND = "correction"
"""What folders of corrections are called."""
MERGED = "the merged model"
_RECORDED = {"output": ("moments", "mean", "std"), "input": ("input_moments", "input.mean", "input.std")}
"""For each side of a module what is recorded of it, and what the facts of mean and deviation are called."""


@dataclass(frozen=True)
class Found:
    """One correction.

    Attributes:
        task: what for.
        facts: where it is kept: ``TENSOR:scale`` and ``TENSOR:shift``, float64, along the tensor's axis of units.
        edits: what becomes of each tensor.
        spread: how each output's spread compares with its goal's, before and after.
    """

    task: Task
    facts: Facts
    edits: Mapping[str, Edit]
    spread: tuple[Spread, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know."""
        return (*summary(self.task.name, self.spread), *self.facts.notes)


def correct(
    sources: Sources, data: SourceData, known: Prepared, progress: Progress, root: Path | None
) -> tuple[Found, ...]:
    """Find all corrections of a plan, or those that were found before.

    Args:
        sources: the plan's sources, in their order.
        data: what is run.
        known: what was made ahead of the merge; jobs are worked on with it.
        progress: is told how many bytes of weights are run.
        root: where folders of facts are kept; the cache by default.

    Raises:
        PlanError: the data cannot be read, or do not suit the models.
        CheckpointError: a model cannot be read or run.
        NonFinite: a weight or an activation is not finite; nothing is kept.
        RunError: the disk is full or fails.
    """
    correction = sources.plan.correction
    assert correction is not None  # whoever asks has looked
    own = replace(sources, plan=replace(sources.plan, jobs=correction.jobs))
    return tuple(_Correcting(own, data, known, correction, task, progress, root).found() for task in correction.tasks)


@dataclass(frozen=True)
class _Correcting:
    """One correction in the making; the plan of ``sources`` is that of the corrected model."""

    sources: Sources
    data: SourceData
    known: Prepared
    correction: Correction
    task: Task
    progress: Progress
    root: Path | None
    jobs: dict[str, Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.jobs.update((job.name, job) for job in self.sources.plan.jobs)

    def found(self) -> Found:
        """Measure what is aimed at and what there is, then correct."""
        aimed = {i: self._of_source(i) for i in self._aimed()}
        merged = self._as_merged()
        targets = self._targets(aimed)
        label = f"{self.task.name or 'all data'}: {', '.join(each.label for each in self.sources.plan.sources)}"
        with facts_folder(KIND, self._decides(aimed), self.root, label) as facts:
            if isinstance(facts, Making):
                with nothing_kept(facts):
                    facts = self._made(facts, targets, merged)
        spread = json.loads((facts.path / SPREAD).read_bytes())
        return Found(self.task, facts, edits_of(facts, self.jobs), tuple(Spread(**each) for each in spread))

    def _aimed(self) -> list[int]:
        """The sources whose moments are aimed at, as places in the plan's."""
        if self.task.source is not None:
            return [self.task.source] if self.correction.outputs.outputs else []
        return sorted({i for each in self.correction.outputs.outputs for i, _ in self._shares(each.weight)})

    def _shares(self, name: str) -> tuple[tuple[int, float], ...]:
        """Whose moments are aimed at for an output, and with which share: the task's model's, or of all merged."""
        if self.task.source is not None:
            return ((self.task.source, 1.0),)
        job = self.jobs[name]
        if self.known.shares is None or CHOSEN not in wanted(job).values():
            return shares(job)
        members = [i for i in merged(job) if self.known.shares.get(i)]
        return tuple((i, 1 / len(members)) for i in members)

    def _batches(self, source: int) -> list[dict[str, Any]]:
        """The task's data as a source reads them."""
        return [batch for each in self.data.named(self.task.data, source) for batch in each.batches()]

    def _digests(self, source: int) -> list[str]:
        return [each.digest for each in self.data.named(self.task.data, source)]

    def _own_name(self, name: str, source: int) -> str:
        """What a source calls a tensor of the output."""
        return next((r.tensor.name for r in self.jobs[name].reads if r.source == source), name)

    def _of_source(self, i: int) -> dict[str, Moments]:
        """The moments of a source's outputs."""
        held = self.sources.plan.sources[i].checkpoint.tensors
        names = {each.weight: self._own_name(each.weight, i) for each in self.correction.outputs.outputs}
        names = {name: own for name, own in names.items() if own in held}
        made_of = {"model": self.sources.made_of(i), "data": self._digests(i)}
        with self.sources.weights(i) as weights:
            return self._moments(self.sources.model(i, weights), i, made_of, names)

    def _as_merged(self) -> dict[str, Moments]:
        """The moments of the merged model's outputs when nothing is corrected."""
        if not self.correction.outputs.outputs:
            return {}
        names = {each.weight: each.weight for each in self.correction.outputs.outputs}
        with self._model({}) as model:
            return self._moments(model, self.sources.plan.tokenizer, self._identity(), names)

    def _moments(
        self, model: Model, reader: int, made_of: Mapping[str, Any], names: Mapping[str, str]
    ) -> dict[str, Moments]:
        """Record a model's moments; those of tensors that no pass went through are left out."""
        kind, mean, std = _RECORDED[self.correction.outputs.outputs[0].side]
        how: dict[str, Any] = {"root": self.root, "progress": self.progress, "strict": False}
        facts = record(model, self._batches(reader), [kind], made_of=made_of, names=sorted(names.values()), **how)
        seen = {name: own for name, own in names.items() if mean in facts.fields(own)}
        get = facts.get
        return {
            name: Moments(get(own, mean).astype(float), get(own, std).astype(float), int(get(own, "count")))
            for name, own in seen.items()
        }

    def _targets(self, aimed: Mapping[int, Mapping[str, Moments]]) -> dict[str, Moments]:
        """What each output should have; outputs that a source never used are left out."""
        found = {}
        for output in self.correction.outputs.outputs:
            whose = self._shares(output.weight)
            if all(output.weight in aimed[i] for i, _ in whose):
                moments = [aimed[i][output.weight] for i, _ in whose]
                found[output.weight] = goal(moments, [share for _, share in whose])
        return found

    def _identity(self) -> dict[str, Any]:
        """What decides the merged model and what it is run on."""
        plan = self.sources.plan
        return {
            "merged": self.sources.made_by(plan.jobs, self.known),
            "lender": self.sources.made_of(plan.lender),
            "config": dict(self.correction.outputs.config),
            "data": self._digests(plan.tokenizer),
        }

    def _decides(self, aimed: Mapping[int, Any]) -> dict[str, Any]:
        """What decides the correction."""
        recipe = self.sources.plan.recipe.correct
        assert recipe is not None  # the plan has a correction of it
        outputs = self.correction.outputs.outputs
        axes = {name: job.corrected for name, job in self.jobs.items() if job.corrected is not None}
        return {
            **self._identity(),
            "correct": {"statistic": recipe.statistic, "clamp": recipe.clamp},
            "outputs": [[each.weight, each.side] for each in outputs],
            "batch_norms": list(self.correction.outputs.batch_norms),
            "aimed": [[i, self.sources.made_of(i), self._digests(i)] for i in aimed],
            "shares": {each.weight: self._shares(each.weight) for each in outputs},
            "axes": axes,
        }

    @contextlib.contextmanager
    def _model(self, edits: Mapping[str, Edit]) -> Iterator[Model]:
        """The merged model for a while, its weights as the edits make them when they are read."""
        known = replace(self.known, edits=edits)
        with merged_weights(self.sources.plan, known, self.sources.device) as weights:
            yield self.sources.merged(weights, MERGED, self.correction.outputs.config)

    def _made(self, folder: Making, targets: Mapping[str, Moments], merged: Mapping[str, Moments]) -> Facts:
        """Correct, and write down what came of it; what a killed run left is gone on with."""
        plan, outputs = self.sources.plan, self.correction.outputs
        recipe = plan.recipe.correct
        assert recipe is not None  # the plan has a correction of it
        samples = sum(len(each) for each in self.data.named(self.task.data, plan.tokenizer))
        settings = Settings(recipe.statistic, recipe.clamp, samples)
        made = edits_of(folder, self.jobs)
        with self._model(made) as model:
            batches = self._batches(plan.tokenizer)
            Sequential(model, batches, outputs, targets, settings, folder, made, self.progress).run()
        arrays = arrays_of(folder)
        corrected = after(outputs.outputs, arrays)
        parts = {each.weight: self.jobs[each.weight].part for each in outputs.outputs}
        found = spreads(self.task.name, parts, targets, merged, corrected)
        atomic_write(folder.path / SPREAD, json.dumps([asdict(each) for each in found], indent=1))
        unseen = [each.weight for each in outputs.outputs if each.weight not in corrected]
        said = (f"never used on this data, and so not corrected: {listed(unseen)}",) if unseen else ()
        return folder.finish((*said, *clamped(outputs.outputs, arrays, recipe.clamp)), (SPREAD,))
