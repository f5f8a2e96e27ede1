"""Matching of attention heads on two levels: key-value heads, and the query heads of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mergetool.anatomy.symmetry import Group, identity
from mergetool.facts.matching_descent import Array, Score, State, check_finite
from mergetool.kernels.assign import assign


@dataclass(frozen=True)
class Attention:
    """One attention by heads; biases are one more column.

    Attributes:
        q: [query heads, width of a head, inputs].
        k: [key-value heads, width, inputs].
        v: [key-value heads, width, inputs].
        o: [query heads, width, outputs]: the columns of the output projection.
    """

    q: Array
    k: Array
    v: Array
    o: Array

    @classmethod
    def of(cls, parts: Mapping[str, Array]) -> Attention:
        """From ``[key-value heads, rows of all their heads, inputs]`` of each part."""
        width = parts["k"].shape[1]
        return cls(
            parts["q"].reshape(-1, width, parts["q"].shape[2]),
            parts["k"],
            parts["v"],
            parts["o"].reshape(-1, width, parts["o"].shape[2]),
        )


def head_scores(reference: Attention, other: Attention) -> Score:
    """How alike each two query heads are, between -1 and 1.

    The mean of the cosines of ``Wq^T Wk`` and of ``Wo Wv``, which no change of basis inside a head alters. Only Gram
    matrices as wide as a head are made: ``<A^T B, C^T D> = sum((A C^T) * (B D^T))``.
    """
    scores = np.zeros((len(reference.q), len(other.q)))
    for first, second in (("q", "k"), ("o", "v")):
        own = _products(*(getattr(model, part) for model in (reference, other) for part in (first, second)))
        left, right = (_norms(getattr(model, first), getattr(model, second)) for model in (reference, other))
        norms = np.outer(left, right)
        scores += own / np.where(norms == 0, 1.0, norms) / 2
    return Score(scores, np.ones(len(scores)), np.ones(len(scores)))


def _products(left: Array, left_shared: Array, right: Array, right_shared: Array) -> Array:
    """Inner products of ``A_i^T B_i`` and ``C_j^T D_j``, where several heads share a B or a D."""
    heads, width, _ = right.shape
    repeat = heads // len(right_shared)
    result = np.empty((len(left), heads))
    rows, shared_rows = right.reshape(heads * width, -1), right_shared.reshape(len(right_shared) * width, -1)
    for shared, block in enumerate(left_shared):
        gram = (block @ shared_rows.T).reshape(width, len(right_shared), width).repeat(repeat, axis=1)
        for head in range(shared * (len(left) // len(left_shared)), (shared + 1) * (len(left) // len(left_shared))):
            own = (left[head] @ rows.T).reshape(width, heads, width)
            result[head] = np.einsum("xhy,xhy->h", own, gram, dtype=np.float64)
    return result


def _norms(heads: Array, shared: Array) -> Array:
    """The Frobenius norm of each head's ``A^T B``."""
    repeat = len(heads) // len(shared)
    grams = (np.einsum("hxd,hyd->hxy", each, each) for each in (heads, shared))
    own, of_shared = grams
    products = np.einsum("hxy,hxy->h", own, of_shared.repeat(repeat, axis=0), dtype=np.float64)
    return np.asarray(np.sqrt(np.maximum(products, 0.0)))


def settle_heads(state: State, outer: Group, inner: Mapping[int, Group], score: Score) -> None:
    """Permutations of key-value heads and of the query heads of each, from how alike two query heads are.

    Args:
        state: takes the permutations.
        outer: the key-value heads.
        inner: the query heads by key-value head of the other model; empty if each has but one, or they stay.
        score: of query heads.
    """
    check_finite(score.scores, outer)
    groups = outer.size
    repeat = len(score.scores) // groups
    blocks = score.scores.reshape(groups, repeat, groups, repeat).transpose(0, 2, 1, 3)
    left, right = (norms.reshape(groups, repeat) for norms in (score.left, score.right))
    within = np.empty((groups, groups))
    here = identity(repeat)
    for i in range(groups):
        for j in range(groups):
            order = assign(blocks[i, j]) if inner else here
            within[i, j] = blocks[i, j][here, order].mean()
    whole = (np.sqrt(np.square(norms).mean(1)) for norms in (left, right))
    order = state.settle(outer, Score(within, *whole))
    for place, source in enumerate(order):
        if int(source) in inner:
            state.settle(inner[int(source)], Score(blocks[place, source], left[place], right[source]))
