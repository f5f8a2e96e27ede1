"""A merged model put right output by output: each is measured when all before it are corrected already.

A layer that is streamed stays in memory while its outputs are taken one after the other; what goes into it is on disk,
so only the layer is run again. Corrected weights come from where all merged weights come from: they are made again
with their edits and rounded as they will be stored, so what later outputs are measured behind is what is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergetool.errors import NonFinite
from mergetool.execute.fact_making import Making
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.names import Group
from mergetool.execute.forward.outputs import Outputs as Activations
from mergetool.execute.forward.passes import REST, WHOLE, CannotStream, Step, nobody, streamed, whole
from mergetool.execute.forward.rows import Batch
from mergetool.execute.forward.watch import Seen, Told, Watch
from mergetool.execute.progress import Progress
from mergetool.execute.record import ACTIVATIONS
from mergetool.facts.correction import Edit, Factors, Moments, batch_norm, factors
from mergetool.facts.correction import Statistic as Kind
from mergetool.facts.outputs import Output, Outputs, edits
from mergetool.facts.statistics import State, accumulate_moments, empty_moments

CORRECTED = ("corrected.mean", "corrected.std")
"""The facts of an output once all is corrected."""
INPUT_SHIFT = "input.shift"
"""The fact of a head: how what it reads is shifted, once it is scaled."""
MERGED = ("merged.mean", "merged.std")
"""The same when all before it was corrected and it was not."""


@dataclass(frozen=True)
class Settings:
    """How factors are found."""

    statistic: Kind
    clamp: float
    samples: int


@dataclass
class Sequential:
    """The estimation of one correction.

    Attributes:
        model: the merged model, its weights edited by what is in ``made``.
        batches: what it is run on.
        found: what is corrected.
        targets: what the units of each output should have, by the output's weight; those without are left alone.
        settings: how factors are found.
        folder: where they are kept.
        made: what becomes of each tensor, so far; the model's weights follow it.
        progress: is told of the bytes of weights that are run.
    """

    model: Model
    batches: Sequence[Batch]
    found: Outputs
    targets: Mapping[str, Moments]
    settings: Settings
    folder: Making
    made: dict[str, Edit]
    progress: Progress
    _group_of: dict[str, Group] = field(default_factory=dict, repr=False)
    _watch: Watch = field(init=False, repr=False)
    _norms: dict[str, torch.nn.Module] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._group_of = {name: group for group in self.model.groups for name in group.names}
        self.found = replace(self.found, outputs=tuple(o for o in self.found.outputs if o.weight in self.targets))
        sides = {side: [o.weight for o in self.found.outputs if o.side == side] for side in ("input", "output")}
        self._watch = Watch(self.model, sides["input"], sides["output"])
        self._norms = {norm: self._module(f"{norm}.running_mean") for norm in self.found.batch_norms}

    def run(self) -> None:
        """Take all outputs in turn; what an interrupted run has done is not done again."""
        if REST in self.folder.steps or WHOLE in self.folder.steps:
            return None
        self.progress.start(2 * self.model.nbytes(self.model.groups), f"correct {self.model.label}")
        try:
            if not any(step.startswith(WHOLE) for step in self.folder.steps):
                try:
                    return self._take(self._blocks())
                except CannotStream:
                    self._forget()
            return self._take(whole(self.model, self.batches, self._watch))
        finally:
            self.progress.close()

    def _forget(self) -> None:
        self.folder.restart()
        self.made.clear()

    def _blocks(self) -> Iterator[Step]:
        """The network block by block; CannotStream where an output outside the blocks comes before any of them."""
        inside = [self._block(output.weight) is not None for output in self.found.outputs]
        if inside != sorted(inside, reverse=True):
            raise CannotStream("is corrected outside the layers before them", self.model.label)
        folder = self.folder.path / ACTIVATIONS
        known = {block.name: block for block in self.model.blocks}
        done = [step for step in self.folder.steps if step in known]
        latest = {known[name].stack: name for name in done}
        if not all(Activations(folder).has(name, len(self.batches)) for name in latest.values()):
            self._forget()  # what went from block to block is gone
            done = []
        return streamed(self.model, self.batches, self._watch, folder, done)

    def _take(self, steps: Iterator[Step]) -> None:
        with contextlib.closing(steps):  # type: ignore[type-var]  # it is a generator
            for step in steps:
                self._unit(step)

    def _unit(self, step: Step) -> None:
        """A block, or all that is outside them, or a whole network: its outputs in turn, then all of them again."""
        outputs = [o for o in self.found.outputs if step.name == WHOLE or self._step(o.weight) == step.name]
        norms = [n for n in self._norms if step.name == WHOLE or self._step(f"{n}.running_mean") == step.name]
        groups = self._order(step, outputs, norms)
        nbytes = 2 * step.nbytes // (len(groups) + 1)
        for place, group in enumerate(groups):
            key = f"{step.name}:{place}"
            if key not in self.folder.steps:
                self._correct(key, group, self._measured(step, {_name(each) for each in group}))
            self.progress.advance(nbytes)
        after = self._measured(step, {output.weight for output in outputs})
        self.folder.add(step.name, self._kept(outputs, after), {}, after)
        self.progress.advance(nbytes)

    def _order(self, step: Step, outputs: Sequence[Output], norms: Sequence[str]) -> list[list[Output | str]]:
        """What is measured together, one group after the other.

        Layers of transformers say in which order they compute; of other networks a batch shows it.
        """
        groups: list[list[Output | str]] = [list(group) for _, group in groupby(outputs, key=lambda o: o.step)]
        groups += [[norm] for norm in norms]
        if len(groups) < 2 or (step.name not in (REST, WHOLE) and not norms):
            return groups
        met: dict[str, int] = {}

        def told(seen: Seen) -> None:
            met.setdefault(seen.name, len(met))

        self._pass(step, told, batches=1)
        lead = self._watch.leaders
        return sorted(groups, key=lambda group: min(met.get(lead.get(_name(e), _name(e)), len(met)) for e in group))

    def _pass(self, step: Step, told: Told, batches: int | None = None) -> None:
        """Run a step on every batch; batch norms tell what they read."""
        with contextlib.ExitStack() as held:
            for name, module in self._norms.items():
                held.callback(module.register_forward_pre_hook(_reader(name, told, self.model.label)).remove)
            for i in range(len(self.batches) if batches is None else batches):
                step.run(i, told)

    def _measured(self, step: Step, names: set[str]) -> dict[str, Moments]:
        """The moments of some outputs, of those that anything was seen of."""
        states: dict[str, State] = {}
        if not names:
            self._pass(step, nobody)
            return {}
        leaders = self._watch.leaders

        def told(seen: Seen) -> None:
            if any(leaders.get(name, name) == seen.name for name in names):
                if seen.name not in states:
                    states[seen.name] = empty_moments(seen.rows.shape[1], seen.rows.device)
                accumulate_moments(states[seen.name], seen.rows)

        self._pass(step, told)
        found = {name: states[leaders.get(name, name)] for name in names if leaders.get(name, name) in states}
        return {name: _moments(state) for name, state in sorted(found.items())}

    def _correct(self, key: str, group: Sequence[Output | str], merged: Mapping[str, Moments]) -> None:
        """Find the edits of a group, keep them, and give the model the weights that they make."""
        seen = [each for each in group if _name(each) in merged]
        changes, facts = dict[str, Edit](), dict[str, NDArray[Any]]()
        for norm in (each for each in seen if isinstance(each, str)):
            mean, variance = batch_norm(merged[norm])
            changes[f"{norm}.running_mean"] = Edit(0, np.zeros_like(mean), mean)
            changes[f"{norm}.running_var"] = Edit(0, np.zeros_like(variance), variance)
        outputs = tuple(each for each in seen if not isinstance(each, str))
        found = {output.weight: self._factors(output, merged[output.weight]) for output in outputs}
        heads = {output.weight: self.model.weights.get(output.weight).numpy() for output in outputs if output.read}
        changes |= edits(replace(self.found, outputs=outputs), found, heads)
        for output in outputs:
            had = merged[output.weight]
            facts |= {f"{output.weight}:{fact}": v for fact, v in zip(MERGED, (had.mean, had.std), strict=True)}
            if output.read:
                facts[f"{output.weight}:{INPUT_SHIFT}"] = found[output.weight].shift
        for name, edit in changes.items():
            facts |= {f"{name}:{f}": v for f, v in (("scale", edit.scale), ("shift", edit.shift)) if v is not None}
        self.folder.add(key, facts, {}, changes)
        self.made.update(changes)
        again = {id(group): group for group in (self._group_of[name] for name in changes)}.values()
        self.model.renew(again)

    def _factors(self, output: Output, merged: Moments) -> Factors:
        how = self.settings
        target = self.targets[output.weight]
        found = factors(target, merged, statistic=how.statistic, clamp=how.clamp, samples=how.samples)
        holds = bool(output.bias) or how.statistic == "std"
        return found if holds else Factors(found.scale, np.zeros_like(found.shift))

    def _kept(self, outputs: Sequence[Output], after: Mapping[str, Moments]) -> dict[str, NDArray[Any]]:
        """What outputs have in the end; what a head reads is corrected in the head, so that nobody sees it."""
        return {
            f"{output.weight}:{fact}": values
            for output in outputs
            if output.weight in after and not output.read
            for fact, values in zip(CORRECTED, (after[output.weight].mean, after[output.weight].std), strict=True)
        }

    def _step(self, name: str) -> str:
        """The step that a tensor's module runs in."""
        block = self._block(name)
        return REST if block is None else block

    def _block(self, name: str) -> str | None:
        block = self.model.block_of(self._group_of[name].parameters[0])
        return None if block is None else block.name

    def _module(self, name: str) -> torch.nn.Module:
        return self.model.module.get_submodule(self._group_of[name].parameters[0].rpartition(".")[0])


def _name(each: Output | str) -> str:
    return each if isinstance(each, str) else each.weight


def _reader(name: str, told: Told, label: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    """A hook that tells what a batch norm reads."""

    def before(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().movedim(1, -1).reshape(-1, args[0].shape[1]).float()
        if not bool(rows.isfinite().all()):
            raise NonFinite("the input of its module holds a NaN or an infinity", f"{label}: {name}")
        told(Seen(name, "input", None, rows))

    return before


def _moments(state: State) -> Moments:
    """In float64, unlike what is kept as facts of models: it is the difference of means that counts."""
    count = int(state["count"])
    std = (state["squares"] / max(count, 1)).sqrt()
    return Moments(state["mean"].cpu().numpy(), std.cpu().numpy(), count)
