"""Which column belongs to which row: the assignment that maximises a sum, and how much of it is worth a move."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]
Order = NDArray[np.int64]


def assign(scores: Scores) -> Order:
    """The permutation ``p`` that maximises ``sum(scores[i, p[i]])``.

    Where every row has its largest entry in a column of its own, those columns are the answer, for no row could have
    more; this is how units of related models meet, and it takes one pass. Otherwise the linear assignment problem is
    solved, in time that grows with the cube of the size. Among equal entries of a row the one on the diagonal counts,
    then the first.

    Args:
        scores: [n, n], finite.

    Returns:
        An index array of n.

    Raises:
        ValueError: the scores are not square or not finite.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"scores of shape {scores.shape} are not square")
    size = len(scores)
    here = np.arange(size, dtype=np.int64)
    if size == 0:
        return here
    if not (np.isfinite(scores.max()) and np.isfinite(scores.min())):  # both are NaN if one score is
        raise ValueError("there is a NaN or an infinity among the scores")
    best = scores.argmax(axis=1).astype(np.int64)
    best = np.where(np.diagonal(scores) == scores[here, best], here, best)
    if len(np.unique(best)) == size:
        return np.asarray(best)
    from scipy.optimize import linear_sum_assignment  # a second's import that the fast path does not need

    return np.asarray(linear_sum_assignment(scores, maximize=True)[1], dtype=np.int64)


def worthwhile(scores: Scores, order: Order, scale: NDArray[np.floating[Any]], margin: float) -> Order:
    """The permutation with only those cycles whose gain over staying is worth a move.

    A permutation falls apart into cycles, and any choice of cycles is again a permutation. One is kept if
    ``sum(scores[i, order[i]] - scores[i, i]) > margin * sum(scale[i])`` over its rows.

    Args:
        scores: [n, n].
        order: the permutation found.
        scale: [n], what a perfect match of each row would score.
        margin: the least gain, as a share of the scale.
    """
    here = np.arange(len(order), dtype=np.int64)
    gains = scores[here, order].astype(np.float64) - scores[here, here]
    kept = here.copy()
    seen = order == here
    for first in np.flatnonzero(~seen):
        if seen[first]:
            continue
        cycle = [int(first)]
        while (following := int(order[cycle[-1]])) != first:
            cycle.append(following)
        seen[cycle] = True
        if gains[cycle].sum() > margin * scale[cycle].sum():
            kept[cycle] = order[cycle]
    return kept
