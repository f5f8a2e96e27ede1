"""Facts recorded: statistics of models that are run over data, into folders named by what they were measured from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetool.errors import NonFinite, PlanError
from mergetool.execute.fact_folder import Facts
from mergetool.execute.fact_making import Making, facts_folder
from mergetool.execute.forward.gradients import Labels
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.outputs import Outputs
from mergetool.execute.forward.passes import REST, WHOLE, CannotStream, Step, streamed, whole
from mergetool.execute.forward.rows import Batch
from mergetool.execute.forward.tally import KERNEL_ROWS, Pair, Tally
from mergetool.execute.forward.watch import Watch
from mergetool.execute.progress import Progress, Quiet
from mergetool.execute.record_gradients import record_gradients
from mergetool.facts.statistics import STATISTICS, Statistic
from mergetool.plan.faults import listed

ACTIVATIONS = "activations"
"""Where a folder in the making keeps what goes from block to block."""


def record(
    model: Model,
    batches: Sequence[Batch],
    statistics: Sequence[str],
    *,
    made_of: Mapping[str, Any],
    names: Collection[str] | Mapping[str, Collection[str]] | None = None,
    strict: bool = True,
    stream: bool | None = None,
    labels: Labels = "sampled",
    seed: int = 0,
    root: Path | None = None,
    progress: Progress | None = None,
) -> Facts:
    """Measure a model, or find what was measured before.

    ``gram`` is of what goes into matrices and ``moments`` of what comes out of modules; both can be had in one pass.
    ``squared_gradients`` and ``sensitivity`` need all weights in memory, and gradients.

    Args:
        model: the model.
        batches: the keyword inputs of each forward pass; places where ``attention_mask`` is 0 do not count.
        statistics: names of :data:`~mergetool.facts.statistics.STATISTICS`, of activations or of gradients.
        made_of: what decides the result besides the arguments here, as JSON: the model's
            :func:`~mergetool.execute.fact_folder.identity` and the data's digest.
        names: tensors on disk, and blocks for ``moments``; the same for all statistics, or for each its own. By
            default all tensors that a statistic can speak of, but no outputs over a vocabulary and none of norms
            inside an attention.
        strict: whether all of ``names`` must be measured; else the facts are of those that can be.
        stream: whether to run one block at a time; by default wherever the network allows it.
        labels: what gradients are taken for.
        seed: what sampled labels are sampled with.
        root: where folders of facts are kept; the cache by default.
        progress: is told how many bytes of weights are done.

    Raises:
        NonFinite: a weight, an activation or a gradient is not finite; nothing is kept.
        CannotStream: ``stream`` is asked for and the network does not allow it.
        PlanError: the data does not suit the model, or one of ``names`` cannot be measured.
        RunError: the disk is full or fails.
    """
    chosen = tuple(STATISTICS[name] for name in statistics)
    sides = {each.side == "gradient" for each in chosen}
    if len(sides) != 1:
        raise ValueError(f"{', '.join(statistics)} cannot be measured in one pass")
    asked: dict[str, Any] = {"statistics": sorted(statistics)}
    of_each = names if isinstance(names, Mapping) else dict.fromkeys(statistics, names)
    asked["names"] = {each: None if chosen is None else sorted(chosen) for each, chosen in of_each.items()}
    if sides == {True}:
        asked |= {"labels": labels, "seed": seed}
    shown = progress or Quiet()
    _refuse_nothing(batches, model)
    with facts_folder("-".join(sorted(statistics)), {**made_of, **asked}, root, model.label) as found:
        if isinstance(found, Facts):
            return found
        with nothing_kept(found):
            if sides == {True}:
                return record_gradients(model, batches, chosen, of_each, labels, seed, found, shown, strict)
            return _activations(model, batches, chosen, of_each, stream, found, shown, strict)


def record_pair(
    first: Model,
    second: Model,
    batches: Sequence[Batch],
    statistic: str,
    *,
    made_of: Mapping[str, Any],
    inputs: Collection[str] = (),
    outputs: Collection[str] = (),
    stream: bool | None = None,
    root: Path | None = None,
    progress: Progress | None = None,
) -> Facts:
    """Measure how two models of one shape relate on the same data, side by side and block by block.

    The fields of the facts say which side they speak of: ``input.correlation``, ``output.cka``.

    Args:
        first: a model.
        second: another with the same tensors.
        batches: the keyword inputs of each forward pass.
        statistic: ``cross``, the signed correlation of every channel of the first with every one of the second;
            ``inner``, the mean of their products; or ``cka``, how alike the features are in all.
        made_of: what decides the result besides the arguments here, as JSON.
        inputs: tensors on disk whose modules' inputs are compared.
        outputs: tensors or blocks whose outputs are compared.
        stream: whether to run one block at a time; by default wherever the networks allow it.
        root: where folders of facts are kept; the cache by default.
        progress: is told how many bytes of weights are done.

    Raises:
        The same as :func:`record`.
    """
    if first.module is second.module:
        raise ValueError("two models cannot be one network: open it twice")
    _refuse_nothing(batches, first)
    asked: dict[str, Any] = {"inputs": sorted(inputs), "outputs": sorted(outputs)}
    if statistic == "cka":
        asked["rows"] = KERNEL_ROWS
    label = f"{first.label}, {second.label}"
    with facts_folder(statistic, {**made_of, **asked}, root, label) as found:
        if isinstance(found, Facts):
            return found
        with nothing_kept(found):
            watches = tuple(Watch(model, inputs, outputs) for model in (first, second))
            tally = Pair(statistic, watches[0], watches[1])
            models = (first, second)

            def steps(streaming: bool) -> Iterator[tuple[Step, ...]]:
                with contextlib.ExitStack() as held:
                    sides = [
                        held.enter_context(contextlib.closing(_steps(model, batches, watch, found, streaming, str(i))))
                        for i, (model, watch) in enumerate(zip(models, watches, strict=True))
                    ]
                    yield from zip(*sides, strict=True)

            _run(models, steps, len(batches), tally, found, stream, progress or Quiet())
            _all_seen(tally, sorted({*inputs, *outputs}), first.label)
            return found.finish()


def _refuse_nothing(batches: Sequence[Batch], model: Model) -> None:
    if not batches:
        raise PlanError("there are no data to measure it with", model.label, "give `calibration` data")


@contextlib.contextmanager
def nothing_kept(found: Making) -> Iterator[None]:
    """Where a number is not finite, leave nothing of a folder behind: what came before it is worth no more."""
    try:
        yield
    except NonFinite:
        found.discard()
        raise


def _activations(
    model: Model,
    batches: Sequence[Batch],
    statistics: Sequence[Statistic],
    names: Mapping[str, Collection[str] | None],
    stream: bool | None,
    found: Making,
    progress: Progress,
    strict: bool,
) -> Facts:
    blank = Watch(model)
    wanted = {
        each.name: frozenset(_measurable(blank, each) if (asked := names[each.name]) is None else asked)
        for each in statistics
    }
    if not strict:
        wanted = {each.name: wanted[each.name] & frozenset(_measurable(blank, each)) for each in statistics}
    of_side = {side: [wanted[each.name] for each in statistics if each.side == side] for side in ("input", "output")}
    watch = Watch(model, frozenset().union(*of_side["input"]), frozenset().union(*of_side["output"]))
    tally = Tally(statistics, watch)

    def steps(streaming: bool) -> Iterator[tuple[Step, ...]]:
        for step in _steps(model, batches, watch, found, streaming, "0"):
            yield (step,)

    _run((model,), steps, len(batches), tally, found, stream, progress)
    if strict:
        _all_seen(tally, sorted({name for asked in names.values() for name in asked or ()}), model.label)
    unseen = sorted(frozenset().union(*wanted.values()) - tally.seen)
    return found.finish((f"never used on this data: {listed(unseen)}",) if unseen else ())


def _measurable(watch: Watch, statistic: Statistic) -> Iterator[str]:
    """All tensors whose activations a statistic can speak of."""
    parts = watch.model.anatomy.parts
    for place in watch.places:
        if statistic.side == "input" and place.has_input:
            yield from place.every
        elif statistic.side == "output" and place.widths and (place.has_input or place.kind == "norm"):
            # Norms inside an attention work on single heads, and not every model keeps their tokens apart.
            roles = ("norm",) if place.kind == "norm" else tuple({parts[name].role for name in place.every})
            yield from (n for n in place.every if parts[n].role in roles and parts[n].vocabulary_axis is None)


def _all_seen(tally: Tally | Pair, names: Sequence[str], label: str) -> None:
    if unseen := [name for name in names if name not in tally.seen]:
        what = f"{listed(unseen)} took no part in any pass, or not as a module of their own"
        raise PlanError(what, label, "leave them out")


def _run(
    models: Sequence[Model],
    steps: Callable[[bool], Iterator[tuple[Step, ...]]],
    batches: int,
    tally: Tally | Pair,
    found: Making,
    stream: bool | None,
    progress: Progress,
) -> None:
    """Run every step that is left, and note each as it is done."""
    if REST in found.steps or WHOLE in found.steps:
        tally.seen.update(found.seen)
        return None
    progress.start(sum(model.nbytes(model.groups) for model in models), f"measure {models[0].label}")
    try:
        if stream is not False:
            try:
                return _take(steps(True), batches, tally, found, progress)
            except CannotStream:
                if stream:
                    raise
        found.restart()
        return _take(steps(False), batches, tally, found, progress)
    finally:
        progress.close()


def _take(
    steps: Iterator[tuple[Step, ...]], batches: int, tally: Tally | Pair, found: Making, progress: Progress
) -> None:
    tally.seen.update(found.seen)
    with contextlib.closing(steps):  # type: ignore[type-var]  # it is a generator
        for together in steps:
            if len({step.name for step in together}) > 1:
                raise PlanError(f"the models do not run alike: {', '.join(step.name for step in together)}")
            nbytes = sum(step.nbytes for step in together)
            for i in range(batches):
                tally.batch([step.run for step in together], i)
                progress.advance(nbytes // batches)
            facts, aliases = tally.finish()
            found.add(together[0].name, facts, aliases, tally.seen)


def _steps(
    model: Model, batches: Sequence[Batch], watch: Watch, found: Making, streaming: bool, side: str
) -> Generator[Step, None, None]:
    if not streaming:
        return whole(model, batches, watch)
    folder = found.path / ACTIVATIONS / side
    known = {block.name: block for block in model.blocks}
    latest = {known[name].stack: name for name in found.steps if name in known}
    if any(
        name not in known or not Outputs(folder).has(latest[known[name].stack], len(batches)) for name in found.steps
    ):
        found.restart()  # begun otherwise, or what went from block to block is gone
    watch.leaders.update(found.aliases)
    return streamed(model, batches, watch, folder, tuple(found.steps))
