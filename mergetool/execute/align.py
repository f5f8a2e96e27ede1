"""Models turned to face one of them: every source is matched with the reference, and what is found is kept as facts.

A delta means something only between two models in one order of units. So where a method takes deltas from a base
there are two cases:

- the base is the reference: every source is turned to face the base, and its delta is taken there. A source of another
  start gets the whole distance between the two starts as part of its delta (arXiv:2410.12766 takes the permuted start
  of its own instead, where there is one: merge the starts and the deltas in two recipes for that);
- the reference is another model: the base would have to be turned too, and by exactly what its fine-tunes are turned
  by, or each delta would hold the noise of two matchings. That holds if nothing has to be turned at all, which is so
  if all are fine-tunes of the base; anything else is refused.

Methods that take no deltas have no such trouble: all that is read is turned, the base too where a rule keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.anatomy import Group, Turning, symmetries
from mergetool.checkpoint.identity import identity
from mergetool.errors import CheckpointError, NonFinite, PlanError, Problem
from mergetool.execute.align_data import Inputs
from mergetool.execute.aligned import Aligned, Alignment
from mergetool.execute.devices import torch_names
from mergetool.execute.fact_folder import Facts
from mergetool.execute.fact_making import Making, facts_folder
from mergetool.execute.progress import Progress, Quiet
from mergetool.facts.matching import Match, Matching
from mergetool.plan import Plan
from mergetool.plan.work import Source
from mergetool.recipe.data import Align

__all__ = ["KIND", "Aligned", "Alignment", "alignment"]

KIND = "alignment"
"""What folders of permutations are called."""


def alignment(
    plan: Plan,
    *,
    trust_code: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    root: Path | None = None,
) -> Alignment:
    """Match every source that is read with the reference, or find what was matched before.

    Args:
        plan: of a recipe with ``align``.
        trust_code: whether the recipe's adapter may be run.
        device: where models are run and their weights compared; the first of several with commas between.
        progress: is told how many bytes of weights are done.
        root: where folders of facts are kept; the cache by default.

    Raises:
        PlanError: the models' symmetries are unknown, or not the same, or there are none; the data cannot be read or
            does not suit the models; or deltas would be taken from a base that is not in the sources' order.
        CheckpointError: a model cannot be read, or cannot be run though it has to be.
        ShapeMismatch: the models differ in the shape of a tensor.
        NonFinite: a weight or an activation is not finite.
        RunError: a turned model is another function, or the disk fails.
    """
    recipe, align = plan.recipe, plan.recipe.align
    if align is None:
        raise ValueError("the recipe has no `align`")
    places = {source.label: i for i, source in enumerate(plan.sources)}
    reference = places[recipe.reference]
    others = [places[label] for label in recipe.sources if places[label] != reference]
    groups = _common(plan.sources[reference], [plan.sources[i] for i in others], align)
    inputs = Inputs(plan, align, plan.sources[reference], trust_code, torch_names(device).partition(",")[0])
    found: dict[int, Aligned] = {}
    for i in others:
        found[i] = _aligned(plan.sources[i], groups, inputs, progress or Quiet(), root)
        _refuse_two_orders(plan, found[i])
    return Alignment(reference, found)


def _common(reference: Source, others: Sequence[Source], align: Align) -> tuple[Group, ...]:
    """The groups of all sources, which must be the same."""
    groups = _groups(reference, align)
    if not groups:
        what = f"it has nothing of {', '.join(align.groups)} that could change places"
        raise PlanError(what, reference.label, "leave out `align`, or name other `align.groups`")
    for other in others:
        theirs = _groups(other, align)
        if theirs != groups:
            mine = {group.name: group for group in groups}
            odd = next((g.name for g in theirs if mine.get(g.name) != g), None)
            odd = odd or next(name for name in mine if name not in {g.name for g in theirs})
            what = f"its units are laid out otherwise than those of {reference.label}: {odd}"
            raise PlanError(what, other.label, "align models of one architecture, size and layout on disk")
    return groups


def _groups(source: Source, align: Align) -> tuple[Group, ...]:
    checkpoint = source.checkpoint
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    try:
        return symmetries(source.anatomy, checkpoint.config, shapes, align.groups)
    except PlanError as error:
        named = (f"{source.label}: {problem.where}" if problem.where else source.label for problem in error.problems)
        pairs = zip(error.problems, named, strict=True)
        raise PlanError(Problem(problem.what, where, problem.fix) for problem, where in pairs) from error


def _aligned(
    source: Source, groups: tuple[Group, ...], inputs: Inputs, progress: Progress, root: Path | None
) -> Aligned:
    """One source matched, checked and kept."""
    reference, align = inputs.reference, inputs.align
    settings = {key: value for key, value in asdict(align).items() if key not in ("reference", "data")}
    made_of: dict[str, Any] = {
        "reference": identity(reference.checkpoint),
        "other": identity(source.checkpoint),
        "align": settings,
        "device": inputs.device.partition(":")[0],
    }
    if align.method == "activation_matching":
        made_of["data"] = [samples.digest for samples in inputs.samples]
        made_of["adapter"] = None if inputs.adapter is None else inputs.adapter.digest
    with facts_folder(KIND, made_of, root, f"{reference.label}, {source.label}") as folder:
        facts = folder if isinstance(folder, Facts) else _made(source, groups, inputs, progress, folder)
    permutations = {group.name: facts.get(group.name, "permutation") for group in groups}
    matches = tuple(_match(group, facts) for group in groups if f"{group.name}:scores" in facts.entries)
    return Aligned(source.label, groups, Turning(groups, permutations), matches, facts)


def _match(group: Group, facts: Facts) -> Match:
    before, found, moved = facts.get(group.name, "scores").tolist()
    return Match(group.name, group.size, before, found, moved)


def _made(source: Source, groups: Sequence[Group], inputs: Inputs, progress: Progress, folder: Making) -> Facts:
    """Match and check; nothing is kept unless both succeed."""
    from mergetool.execute.forward.weights import open_weights

    try:
        with open_weights(inputs.reference.checkpoint) as first, open_weights(source.checkpoint) as second:
            found = _matched(groups, inputs, source, (first, second), folder, progress)
            turning = Turning(groups, found.permutations)
            moved = any(match.moved for match in found.matches)
            notes = _checked(source, second, groups, turning, inputs, folder) if moved and inputs.align.verify else ()
    except NonFinite:
        folder.discard()
        raise
    kept = {f"{name}:permutation": order.astype(np.int64) for name, order in found.permutations.items()}
    scores = {f"{m.group}:scores": np.array([m.identity, m.found, m.moved], np.float64) for m in found.matches}
    folder.add("match", {**kept, **scores}, {}, found.permutations)
    return folder.finish(notes)


def _matched(
    groups: Sequence[Group],
    inputs: Inputs,
    source: Source,
    weights: tuple[Any, Any],
    folder: Making,
    progress: Progress,
) -> Matching:
    from mergetool.execute.align_match import adding_on, by_activations, by_weights
    from mergetool.execute.forward.model import open_model

    pair = inputs.reference, source
    if inputs.align.method == "weight_matching":
        add = adding_on(inputs.device)
        return by_weights(groups, weights, (pair[0].label, pair[1].label), inputs.align, add, progress)
    first, second = (
        open_model(each.checkpoint.config, own, each.label, inputs.network, inputs.device)
        for each, own in zip(pair, weights, strict=True)
    )
    batches = [batch for samples in inputs.samples for batch in samples.batches()]
    return by_activations(groups, (first, second), batches, inputs.align, folder.path / "alike", progress)


def _checked(
    source: Source, weights: Any, groups: Sequence[Group], turning: Turning, inputs: Inputs, folder: Making
) -> tuple[str, ...]:
    """Run the turned model beside its original; what stood in the way, where there are no data that say how to."""
    from mergetool.execute.align_check import check, few, random_batches

    config = source.checkpoint.config
    batches = few(inputs.few)
    try:
        if not batches and not (batches := random_batches(config, inputs.align.seed)):
            return ("it is not known what the model could be run on, so the turned model was not checked",)
        beside = folder.path / "activations"
        check(config, weights, source.label, groups, turning, batches, beside, inputs.network, inputs.device)
    except (PlanError, CheckpointError) as error:
        if inputs.data:
            raise
        return (f"the turned model was not checked: {error.problems[0].what}",)
    return ()


def _refuse_two_orders(plan: Plan, aligned: Aligned) -> None:
    """Refuse deltas from a base where not all models have the order of that base."""
    recipe = plan.recipe
    if recipe.reference == recipe.base_model or not aligned.moved:
        return
    used = [recipe.method(), *(recipe.method(rule) for rule in recipe.rules if not (rule.keep or rule.drop))]
    takes = next((method.name for method in used if method.base == "required"), None)
    if takes is None:
        return
    share = len(aligned.moved) / len(aligned.matches)
    what = (
        f"`{takes}` takes deltas from {recipe.base_model}, and the models have not one order of units: "
        f"{aligned.label} differs from {recipe.reference} in {share:.0%} of the groups"
    )
    raise PlanError(
        what, recipe.where("align"), f"set `align.reference: {recipe.base_model}`, so that all face the base"
    )
