"""Matching by activations: units are alike if they are correlated on the same data."""

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
    match_all,
)
from mergetool.facts.matching_heads import settle_heads
from mergetool.kernels.assign import assign

Correlation = Callable[[str, str], Array]
"""``(tensor, side)`` → [channels of the reference, channels of the other], at the ``input`` or ``output`` of the layer
whose weight the tensor is: centred, divided by both standard deviations, with its sign."""

_INPUTS = {
    "mlp": ("mlp.down",),
    "heads": ("attention.o",),
    "vo": ("attention.o",),
    "units": ("input",),
    "residual": ("mlp.up", "mlp.gate_up", "router"),
}


def watched(groups: Iterable[Group]) -> tuple[tuple[str, str], ...]:
    """The ``(tensor, side)`` pairs whose correlations :func:`activation_matching` asks for, each once."""
    pairs = ((member.tensor, side) for group in groups for member, side in _watched(group))
    return tuple(dict.fromkeys(pairs))


def activation_matching(
    groups: Sequence[Group],
    correlation: Correlation,
    *,
    seed: int = 0,
    max_sweeps: int = DEFAULT_SWEEPS,
    margin: float = DEFAULT_MARGIN,
) -> Matching:
    """Permutations of the other model towards the reference, by the correlation of units on the same data.

    Hidden units are compared at the input of the layer that reads them. Two heads are as alike as their best matching
    inner dimensions are, if those may be turned, and as their own dimensions otherwise; then key-value heads, the query
    heads of each and the inner dimensions are assigned. Experts are compared by their router's outputs.

    The hidden units of experts see other tokens in each model, so they have no correlation: they are left out of the
    result, and :func:`~mergetool.facts.matching.weight_matching` finds them with this result as ``fixed``.

    Args:
        groups: from :func:`mergetool.anatomy.symmetries`.
        correlation: gives the facts that :func:`watched` names.
        seed: of the order in which groups are gone over.
        max_sweeps: at most so many rounds over groups that share tensors.
        margin: the least gain in correlation over the identity; judged for each cycle.

    Raises:
        NonFinite: there is a NaN or an infinity among the correlations.
    """
    covered = [group for group in groups if any(_watched(group))]

    def solve(state: State, step: Sequence[Group]) -> None:
        outer = step[0]
        if outer.kind == "heads" and outer.unit < 0:
            inner = {group.unit: group for group in step[1:]}
            settle_heads(state, outer, inner, _heads(state, outer, correlation))
            return
        for group in step:
            state.settle(group, _units(state, group, correlation))

    return match_all(covered, lambda component: solve, {}, seed, max_sweeps, margin)


def _watched(group: Group) -> Iterable[tuple[Member, str]]:
    """The members at whose layers the units of a group are seen."""
    if group.kind == "experts":
        return [(member, "output") for member in group.members if member.role == "router"][:1]
    roles = _INPUTS[group.kind]
    return [(member, "input") for member in group.members if member.role in roles and member.slab is None]


def _units(state: State, group: Group, correlation: Correlation) -> Score:
    """Mean correlations of units over their inner dimensions and over the places they are seen at."""
    turning = state.turning([group.name])
    scores, count = np.zeros((group.size, group.size)), 0
    for member, side in _watched(group):
        values = correlation(member.tensor, side)
        order = turning.along(member.tensor, member.axis, values.shape[1])
        places = member.places(turning.lands(member, values.shape[1])[2])
        turned = values[:, order]
        for inner in places.T:
            scores += turned[np.ix_(inner, inner)]
            count += 1
    return Score(scores / count, np.ones(group.size), np.ones(group.size))


def _heads(state: State, outer: Group, correlation: Correlation) -> Array:
    """How alike two query heads are, by their outputs."""
    module = [group for group in state.groups.values() if group.module == outer.module]
    turning = state.turning(group.name for group in module)
    width = next(member.block for member in outer.members if member.role == "attention.k")
    member = next(member for member, _ in _watched(outer))
    values = correlation(member.tensor, "input")
    values = values[:, turning.along(member.tensor, member.axis, values.shape[1])]
    heads = len(values) // width
    blocks = values.reshape(heads, width, heads, width)
    if not any(group.kind == "vo" for group in module):
        return np.asarray(np.einsum("ixjx->ij", blocks) / width)
    here, scores = np.arange(width), np.empty((heads, heads))
    for i in range(heads):
        for j in range(heads):
            block = blocks[i, :, j]
            scores[i, j] = block[here, assign(block)].mean()
    return scores
