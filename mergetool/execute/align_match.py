"""Two models matched: permutations of one towards the other, by their weights or by what they compute on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import Group, Permutations
from mergetool.execute.forward.arrays import Get, getter
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.rows import Batch
from mergetool.execute.forward.weights import Weights
from mergetool.execute.progress import Progress
from mergetool.execute.record import record_pair
from mergetool.facts.matching import (
    AddProducts,
    Alike,
    Matching,
    Score,
    activation_matching,
    scored,
    watched,
    weight_matching,
)
from mergetool.facts.matching_weights import ROWS, add_products
from mergetool.recipe.data import Align

Array = NDArray[Any]
_STATISTICS = {"correlation": "cross", "inner_product": "inner"}
"""What is measured for each score of matching by activations."""


def by_weights(
    groups: Sequence[Group],
    weights: tuple[Weights, Weights],
    labels: tuple[str, str],
    align: Align,
    add: AddProducts,
    progress: Progress,
    fixed: Permutations | None = None,
) -> Matching:
    """Match by weights, the tensors of one module in memory at a time.

    Args:
        groups: what may change places, the same in both models.
        weights: the reference's, and those of the model that is turned.
        labels: the models, for messages.
        align: how to match.
        add: adds products of the rows of weights.
        progress: is told of every tensor that is read for the first time.
        fixed: permutations that are known already.

    Raises:
        ShapeMismatch: the models differ in the shape of a tensor.
        NonFinite: a weight is not finite.
    """
    known = fixed or {}
    names = dict.fromkeys(name for group in groups if group.name not in known for name in group.tensors)
    total = 2 * sum(4 * prod(weights[0].shapes[name]) for name in names)
    progress.start(total, f"align {labels[1]}")
    gets = [_told(getter(each, label), set(names), progress) for each, label in zip(weights, labels, strict=True)]
    try:
        return weight_matching(
            groups, gets[0], gets[1], fixed=fixed, seed=align.seed, max_sweeps=align.max_sweeps, margin=align.margin,
            add=add,
        )  # fmt: skip
    finally:
        progress.close()


def _told(get: Get, untold: set[str], progress: Progress) -> Get:
    def telling(name: str) -> Array:
        values = get(name)
        if name in untold:
            untold.discard(name)
            progress.advance(values.nbytes)
        return values

    return telling


def by_activations(
    groups: Sequence[Group],
    models: tuple[Model, Model],
    batches: Sequence[Batch],
    align: Align,
    folder: Path,
    progress: Progress,
) -> Matching:
    """Match by what units do on the same data; hidden units of experts, which see other data, by weights.

    Args:
        groups: what may change places, the same in both models.
        models: the reference, and the model that is turned.
        batches: the keyword inputs of each forward pass.
        align: how to match.
        folder: where it is kept meanwhile how alike units are, ``n² * 4`` bytes for ``n`` units.
        progress: is told how many bytes of weights are done.

    Raises:
        NonFinite: a weight or an activation is not finite.
        PlanError: the data does not suit the models.
        ShapeMismatch: the models differ in the shape of a tensor.
    """
    pairs = watched(groups)
    permutations: Permutations = {}
    first = Matching({})
    if pairs:
        sides = {side: [name for name, at in pairs if at == side] for side in ("input", "output")}
        facts = record_pair(
            models[0], models[1], batches, _STATISTICS[align.score], made_of={}, inputs=sides["input"],
            outputs=sides["output"], root=folder, progress=progress,
        )  # fmt: skip
        of_channels = _channels(facts.get, align.score, models[0].weights.shapes)
        how: dict[str, Any] = {"seed": align.seed, "max_sweeps": align.max_sweeps, "margin": align.margin}
        first = activation_matching(groups, of_channels, **how)
        permutations = first.permutations
    if all(group.name in permutations for group in groups):
        return first
    labels = models[0].label, models[1].label
    weights, add = (models[0].weights, models[1].weights), adding_on(str(models[0].device))
    rest = by_weights(groups, weights, labels, align, add, progress, permutations)
    matches = {match.group: match for match in (*first.matches, *rest.matches)}
    ordered = tuple(matches[group.name] for group in groups if group.name in matches)
    return Matching(rest.permutations, ordered, max(first.sweeps, rest.sweeps))


def _channels(get: Callable[[str, str], Array], score: str, shapes: Mapping[str, tuple[int, ...]]) -> Alike:
    """How alike channels are; of what a convolution reads, on average over the places of its kernel."""

    def alike(tensor: str, side: str) -> Score:
        found = scored(score, lambda field: get(tensor, f"{side}.{field}"))
        shape = shapes[tensor]
        return found if side == "output" or len(shape) < 3 else _over_kernels(found, prod(shape[2:]))

    return alike


def _over_kernels(score: Score, kernel: int) -> Score:
    """How alike the channels are that a convolution reads, from how alike these are at every place of its kernel."""
    blocks = score.scores.reshape(len(score.left) // kernel, kernel, -1, kernel)
    norms = (np.sqrt(np.square(n).reshape(-1, kernel).mean(1)) for n in (score.left, score.right))
    return Score(np.asarray(np.einsum("ikjk->ij", blocks) / kernel), *norms)


def adding_on(device: str) -> AddProducts:
    """What adds the products of the rows of float32 matrices on a device; on the CPU without torch."""
    if device == "cpu":
        return add_products
    import torch

    def add(scores: Array, left: Array, right: Array) -> None:
        other = torch.from_numpy(np.ascontiguousarray(right)).to(device).T
        for start in range(0, len(left), ROWS):
            rows = torch.from_numpy(np.ascontiguousarray(left[start : start + ROWS])).to(device)
            scores[start : start + ROWS] += (rows @ other).cpu().numpy()

    return add
