"""Matching by activations: units are alike if they are correlated, or close to each other, on the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mergetool.anatomy.symmetry import Group, Member
from mergetool.facts.matching_descent import (
    DEFAULT_MARGIN,
    DEFAULT_SWEEPS,
    Array,
    Matching,
    Score,
    State,
    check_finite,
    match_all,
)
from mergetool.facts.matching_heads import settle_heads

Alike = Callable[[str, str], Score]
"""``(tensor, side)`` → how alike the channels of the reference and of the other are, at the ``input`` or ``output`` of
the layer whose weight the tensor is: see :func:`scored`."""

_INPUTS = {
    "mlp": ("mlp.down",),
    "heads": ("attention.o",),
    "vo": ("attention.o",),
    "units": ("input",),
    "residual": ("mlp.up", "mlp.gate_up", "router"),
}


def scored(score: str, field: Callable[[str], Array]) -> Score:
    """How alike the channels of two models are.

    Args:
        score: ``correlation``, where a perfect match of any two channels is 1; or ``inner_product``, where it is the
            product of their root mean squares.
        field: gives what :func:`~mergetool.facts.statistics.finish_cross` finds for the one, and
            :func:`~mergetool.facts.statistics.finish_inner` for the other, by its name.
    """
    if score == "inner_product":
        return Score(field("inner"), field("rms_1"), field("rms_2"))
    values = field("correlation")
    return Score(values, *(np.ones(size, np.float32) for size in values.shape))


def watched(groups: Iterable[Group]) -> tuple[tuple[str, str], ...]:
    """The ``(tensor, side)`` pairs that :func:`activation_matching` asks about, each once."""
    pairs = ((member.tensor, side) for group in groups for member, side in _watched(group))
    return tuple(dict.fromkeys(pairs))


def activation_matching(
    groups: Sequence[Group],
    alike: Alike,
    *,
    seed: int = 0,
    max_sweeps: int = DEFAULT_SWEEPS,
    margin: float = DEFAULT_MARGIN,
) -> Matching:
    """Permutations of the other model towards the reference, by what units do on the same data.

    With correlations, units belong together that rise and fall together, however strong they are (Li et al. 2015,
    arXiv:1511.07543). With inner products, the order is found in which the distance ``sum(|x_i - y_p(i)|²)`` is least:
    strong units decide (Git Re-Basin, arXiv:2209.04836).

    Hidden units are compared at the input of the layer that reads them. Two heads are as alike as their best matching
    inner dimensions are, if those may be turned, and as their own dimensions otherwise; then key-value heads, the query
    heads of each and the inner dimensions are assigned. Experts are compared by their router's outputs.

    The hidden units of experts see other tokens in each model, so they cannot be compared: they are left out of the
    result, and :func:`~mergetool.facts.matching.weight_matching` finds them with this result as ``fixed``.

    Args:
        groups: from :func:`mergetool.anatomy.symmetries`.
        alike: gives the facts that :func:`watched` names.
        seed: of the order in which groups are gone over.
        max_sweeps: at most so many rounds over groups that share tensors.
        margin: the least gain over the identity, as a share of a perfect match; judged for each cycle.

    Raises:
        NonFinite: there is a NaN or an infinity in how alike they are.
    """
    covered = [group for group in groups if any(_watched(group))]

    def solve(state: State, step: Sequence[Group]) -> None:
        outer = step[0]
        if outer.kind == "heads" and outer.unit < 0:
            inner = {group.unit: group for group in step[1:]}
            settle_heads(state, outer, inner, _heads(state, outer, alike))
            return
        for group in step:
            score = _units(state, group, alike)
            check_finite(score.scores, group)
            state.settle(group, score, score.nearest())

    return match_all(covered, lambda component: solve, {}, seed, max_sweeps, margin)


def _watched(group: Group) -> Iterable[tuple[Member, str]]:
    """The members at whose layers the units of a group are seen."""
    if group.kind == "experts":
        return [(member, "output") for member in group.members if member.role == "router"][:1]
    roles = _INPUTS[group.kind]
    return [(member, "input") for member in group.members if member.role in roles and member.slab is None]


def _units(state: State, group: Group, alike: Alike) -> Score:
    """How alike units are, on average over their inner dimensions and over the places they are seen at."""
    turning = state.turning([group.name])
    scores, count = np.zeros((group.size, group.size)), 0
    left, right = np.zeros(group.size), np.zeros(group.size)  # of squares, so that a twin is a perfect match
    for member, side in _watched(group):
        seen = alike(member.tensor, side)
        channels = len(seen.right)
        order = turning.along(member.tensor, member.axis, channels)
        places = member.places(turning.lands(member, channels)[2])
        turned = seen.scores[:, order]
        for inner in places.T:
            scores += turned[np.ix_(inner, inner)]
            left += np.square(seen.left[inner], dtype=np.float64)
            right += np.square(seen.right[order[inner]], dtype=np.float64)
            count += 1
    scores /= count
    return Score(scores, np.sqrt(left / count), np.sqrt(right / count))


def _heads(state: State, outer: Group, alike: Alike) -> Score:
    """How alike two query heads are, by their outputs."""
    module = [group for group in state.groups.values() if group.module == outer.module]
    turning = state.turning(group.name for group in module)
    width = next(member.block for member in outer.members if member.role == "attention.k")
    member = next(member for member, _ in _watched(outer))
    seen = alike(member.tensor, "input")
    order = turning.along(member.tensor, member.axis, len(seen.right))
    heads = len(order) // width
    blocks = seen.scores[:, order].reshape(heads, width, heads, width)
    left, right = (n.astype(np.float64).reshape(heads, width) for n in (seen.left, seen.right[order]))
    norms = (np.sqrt(np.square(each).mean(1)) for each in (left, right))
    if not any(group.kind == "vo" for group in module):
        return Score(np.asarray(np.einsum("ixjx->ij", blocks) / width), *norms)
    here, scores = np.arange(width), np.empty((heads, heads))
    for i in range(heads):
        for j in range(heads):
            block = blocks[i, :, j]
            scores[i, j] = block[here, Score(block, left[i], right[j]).nearest()].mean()
    return Score(scores, *norms)
