"""Gram matrices measured while the layers are merged: each source's layer on what the merged layers before it make.

One network runs over the data of all sources, a layer at a time. When a layer's turn comes its inputs are what the
merged layers made of the data. Each source's own weights are put into it in turn and run on that source's data, so that
the inputs of its matrices are seen; then its tensors are merged with what was seen, and run on all data for the layer
behind it. What lies outside all layers comes last, as one more layer: the head and what is around it. What the first
layer is given is made by the merged embeddings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mergetool.errors import NonFinite, PlanError
from mergetool.execute.fact_folder import Facts, under
from mergetool.execute.fact_making import Making, facts_folder
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.names import Group
from mergetool.execute.forward.outputs import Outputs
from mergetool.execute.forward.passes import REST, CannotStream, Step, nobody, streamed
from mergetool.execute.forward.rows import Batch
from mergetool.execute.forward.tally import Tally
from mergetool.execute.forward.watch import Watch
from mergetool.execute.forward.weights import Weights
from mergetool.execute.merged import Merged, merged_weights
from mergetool.execute.prepare_data import SourceData
from mergetool.execute.prepare_models import Sources, transposed
from mergetool.execute.prepared import Prepared
from mergetool.execute.progress import Progress
from mergetool.execute.record import ACTIVATIONS
from mergetool.facts.statistics import STATISTICS
from mergetool.plan import Plan
from mergetool.plan.faults import listed
from mergetool.plan.stages import GRAM, measured, merged
from mergetool.storage.dtypes import dtype

KIND = "gram-sequential"
"""What folders of such Gram matrices are called."""


def measure_in_sequence(
    sources: Sources, data: SourceData, known: Prepared, progress: Progress, root: Path | None
) -> Prepared:
    """Measure the Gram matrices of all sources layer by layer, or find what was measured before.

    Args:
        sources: the plan's sources.
        data: their data.
        known: all else that is known ahead of the jobs.
        progress: is told how many bytes of weights are read.
        root: where folders of facts are kept; the cache by default.

    Returns:
        What is known, with the Gram matrices.

    Raises:
        PlanError: the network's layers do not run one after the other, each once, or do not suit the data.
        CheckpointError: a model cannot be read or run.
        NonFinite: a weight or an activation is not finite; nothing is kept.
        RunError: the disk is full or fails.
    """
    plan = sources.plan
    own = next(merged(job) for job in plan.jobs if GRAM in measured(job))
    samples = [data.of(source) for source in own]
    made_of = {
        "models": [sources.made_of(source) for source in own],
        "lender": sources.made_of(plan.lender),
        "data": [[each.digest for each in every] for every in samples],
        "jobs": sources.made_by(plan.jobs, known, dtypes=False),
    }
    with facts_folder(KIND, made_of, root, ", ".join(sources.labels(own))) as found:
        if isinstance(found, Making):
            batches = [[batch for each in every for batch in each.batches()] for every in samples]
            found = _made(sources, own, batches, known, found, progress)
        grams = {(GRAM, source): under(found, f"{i}/") for i, source in enumerate(own)}
    with merged_weights(plan, known, sources.device) as weights:  # no weight is read
        turned = transposed(_open(sources, weights))
    return replace(known, measured={**known.measured, **grams}, transposed=known.transposed | turned)


def _open(sources: Sources, weights: Weights) -> Model:
    """The network of the merged model, called as the one that lends its config."""
    return sources.merged(weights, sources.plan.sources[sources.plan.lender].label)


def _made(
    sources: Sources,
    own: Sequence[int],
    batches: Sequence[Sequence[Batch]],
    known: Prepared,
    found: Making,
    progress: Progress,
) -> Facts:
    """Go through the layers that are left; those that a killed run finished are gone on from."""
    plan = sources.plan
    jobs = tuple(replace(job, dtype=dtype("F32")) if job.method else job for job in plan.jobs)
    exact = replace(plan, jobs=jobs)  # what is stored later decides nothing here
    with contextlib.ExitStack() as held:
        weights = held.enter_context(merged_weights(exact, replace(known, plan=exact), sources.device))
        every = [_Own(plan, source, held.enter_context(sources.weights(source))) for source in own]
        either = _Either(weights, every)
        model = _open(sources, either)
        either.outside = frozenset(name for group in model.groups_in(None) for name in group.names)
        sequence = _Sequence(plan, model, either, batches, found, progress, replace(known, plan=exact))
        progress.start((len(own) + 1) * model.nbytes(model.groups), "measure layer by layer")
        try:
            notes = sequence.run()
        except NonFinite:
            found.discard()
            raise
        except CannotStream as error:
            what = f"{error.problems[0].what}, and `sequential` needs layers that run one after the other, each once"
            raise PlanError(what, error.problems[0].where, "leave out `sequential`") from error
        finally:
            progress.close()
    return found.finish(notes)


@dataclass(frozen=True)
class _Own:
    """The weights of a source by the names of the output: a tied one may be stored under its other name."""

    plan: Plan
    source: int
    weights: Weights

    @property
    def names(self) -> Mapping[str, str]:
        """The name of every tensor in the source, by the output's."""
        reads = ((job.name, read) for job in self.plan.jobs for read in (*job.reads, *job.compare))
        return {name: read.tensor.name for name, read in reads if read.source == self.source}


class _Either:
    """The weights of the source whose turn it is, or the merged ones; a ``Weights``."""

    def __init__(self, merged: Merged, sources: Sequence[_Own]) -> None:
        self.merged, self.sources = merged, sources
        self.names = [source.names for source in sources]
        self.shapes: Mapping[str, tuple[int, ...]] = merged.shapes
        self.turn: int | None = 0
        """Whose the weights of layers are; None: merged."""
        self.outside: frozenset[str] = frozenset()
        """The names outside all layers: merged, until their own turn has come."""

    def get(self, name: str) -> torch.Tensor:
        """A tensor in its shape."""
        if self.turn is None or name in self.outside:
            return self.merged.get(name)
        own, held = self.names[self.turn].get(name, name), self.sources[self.turn].weights
        return held.get(own) if own in held.shapes else self.merged.get(name)


class _Sequence:
    """The layers of a network in their order, each measured for every source and then merged."""

    def __init__(
        self,
        plan: Plan,
        model: Model,
        weights: _Either,
        batches: Sequence[Sequence[Batch]],
        found: Making,
        progress: Progress,
        known: Prepared,
    ) -> None:
        self.model, self.weights, self.found, self.progress = model, weights, found, progress
        self.own = batches
        self.known = replace(known, transposed=known.transposed | transposed(model))
        self.batches = [batch for each in batches for batch in each]
        asked = {job.name for job in plan.jobs if GRAM in measured(job)}
        can = {name for place in Watch(model).places if place.has_input for name in place.every}
        self.watch = Watch(model, inputs=asked & can)
        self.tally = Tally([STATISTICS[GRAM]], self.watch)
        self.tally.seen.update(found.seen)
        self.outputs = Outputs(found.path / ACTIVATIONS)

    def run(self) -> tuple[str, ...]:
        """Measure and merge all that is left; what a reader should know."""
        if not self._has(REST):
            with contextlib.closing(self._steps()) as steps:
                for step in steps:
                    self._measure(step)
                    if step.name != REST:
                        self._merge(step)
        unseen = sorted(self.watch.inputs - {name.partition("/")[2] for name in self.found.done.names})
        return (f"never used on this data: {listed(unseen)}",) if unseen else ()

    def _steps(self) -> Generator[Step, None, None]:
        return streamed(self.model, self.batches, self.watch, self.outputs.folder, self._done())

    def _has(self, name: str) -> bool:
        """Whether a layer was measured for every source."""
        return all(_step(i, name) in self.found.steps for i in range(len(self.own)))

    def _done(self) -> tuple[str, ...]:
        """The layers that were measured and merged; one whose outputs are not complete is merged again."""
        known = {block.name: block for block in self.model.blocks}
        last = f"{len(self.own) - 1}/"
        done = [step.removeprefix(last) for step in self.found.steps if step.startswith(last)]
        done = [name for name in done if name in known]
        if done and not self.outputs.has(done[-1], len(self.batches)):
            done.pop()
        latest = {known[name].stack: name for name in done}
        if not all(self.outputs.has(name, len(self.batches)) for name in latest.values()):
            self.found.restart()  # what went from layer to layer is gone
            return ()
        return tuple(done)

    def _measure(self, step: Step) -> None:
        """Run each source's own layer on its data; what was measured before the last kill is left."""
        groups = self._groups(step)
        first = 0
        for i, own in enumerate(self.own):
            places = range(first, first + len(own))
            first += len(own)
            if _step(i, step.name) not in self.found.steps:
                if step.name == REST:
                    self.weights.outside = frozenset()
                self._put(groups, i)
                for place in places:
                    self.tally.batch([partial(step.run, keep=False)], place)
                self._add(i, step.name)
            self.progress.advance(step.nbytes)

    def _groups(self, step: Step) -> tuple[Group, ...]:
        block = next((block for block in self.model.blocks if block.name == step.name), None)
        return self.model.groups_in(block)

    def _put(self, groups: Sequence[Group], turn: int | None) -> None:
        """Put the weights of a source into a layer, or the merged ones; the head gets its own when it is reached."""
        self.model.free(groups)
        self.weights.turn = turn
        self.model.load(group for group in groups if group not in self.model.head_groups)

    def _add(self, i: int, name: str) -> None:
        facts, aliases = self.tally.finish()
        names = self.weights.names[i]

        def own(name: str) -> str:
            return f"{i}/{names.get(name, name)}"

        kept = {f"{own(key)}:{field}": v for (key, _, field), v in ((k.rpartition(":"), v) for k, v in facts.items())}
        shared = {own(name): own(leader) for name, leader in aliases.items()}
        self.found.add(_step(i, name), kept, shared, self.tally.seen)

    def _merge(self, step: Step) -> None:
        """Run the merged layer on all data."""
        facts = self.found.done
        own = self.weights.sources
        grams = {(GRAM, each.source): under(facts, f"{i}/") for i, each in enumerate(own)}
        self.weights.merged.known = replace(self.known, measured={**self.known.measured, **grams})
        self._put(self._groups(step), None)
        for place in range(len(self.batches)):
            step.run(place, nobody)
        self.weights.turn = 0
        self.progress.advance(step.nbytes)


def _step(i: int, name: str) -> str:
    """What a layer measured for a source is noted as."""
    return f"{i}/{name}"
