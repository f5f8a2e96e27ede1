"""Penalties on DAM's coefficients themselves: similarity, overlap, L1, L2; and coefficients that sum to one.

Coefficients are given tensor by tensor, [sources, ...]; penalties are summed over the tensors. Where a weight's are the
sum of its columns' and its rows', penalties look at its :func:`marginals` as if they were two tensors' coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch.nn.functional import cosine_similarity

from mergetool.facts.dam import Slot
from mergetool.facts.dam_merge import Reads


def marginals(slot: Slot, coefficients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The coefficient of each column in the mean over its rows, and of each row in the mean over its columns.

    Numbers that are taken from all columns and given to all rows change no weight, and so nothing of these. A weight
    with one set of coefficients has them as they are.

    Args:
        slot: a weight's coefficients.
        coefficients: of each of its sets, [sources, ...].
    """
    if slot.rows is None:
        return tuple(coefficients)
    sets, count = slot.sets, len(coefficients[0])
    wide = [c.reshape(each.over_weight(count)) for each, c in zip(sets, coefficients, strict=True)]
    made = []
    for own, other in ((0, 1), (1, 0)):
        along = [1 + axis for axis in sets[other].axes if axis not in sets[own].axes]
        made.append((wide[own] + wide[other].mean(along, keepdim=True)).reshape(sets[own].coefficients(count)))
    return tuple(made)


def similarity(coefficients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The cosine of two sources' coefficients, averaged over the pairs of sources."""
    total = torch.zeros(())
    for each in coefficients:
        flat = each.flatten(1) if each.ndim > 1 else each.unsqueeze(1)
        pairs = [cosine_similarity(flat[i], flat[j], dim=0) for i, j in combinations(range(len(flat)), 2)]
        total = total.to(each) + torch.stack(pairs).mean()
    return total


def overlap(coefficients: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """The smaller magnitude of two sources' coefficients, summed over columns, averaged over pairs of sources.

    Args:
        coefficients: [sources, ...] of each tensor.
        weights: [pairs, ...] of each tensor, as :func:`interference` gives them; None for ones.
    """
    total = torch.zeros(())
    for number, each in enumerate(coefficients):
        size = each.abs()
        pairs = [torch.minimum(size[i], size[j]) for i, j in combinations(range(len(size)), 2)]
        if weights is not None:
            pairs = [pair * weight for pair, weight in zip(pairs, weights[number].to(each), strict=True)]
        total = total.to(each) + torch.stack([pair.sum() for pair in pairs]).mean()
    return total


def interference(reads: Reads) -> torch.Tensor:
    """``sin^2(2 angle)`` between the columns of two sources' deltas: 0 where parallel or orthogonal, 1 at 45 degrees.

    Returns:
        [pairs, ...]: for each pair of sources what multiplies the overlap of each coefficient.
    """
    tensors, summed = list(reads), reads.slot.summed
    result = []
    for first, second in combinations(tensors, 2):
        if not summed:  # a single number has no angle but 0
            result.append(torch.zeros_like(first))
            continue
        dot = (first * second).sum(summed)
        lengths = (first.square().sum(summed) * second.square().sum(summed)).clamp_min(torch.finfo(dot.dtype).tiny)
        squared = (dot.square() / lengths).clamp(max=1.0)  # of the cosine
        result.append(4 * squared * (1 - squared))
    return torch.stack(result)


def norms(coefficients: Sequence[torch.Tensor], order: int) -> torch.Tensor:
    """The L1 or L2 norm, not squared, of each source's coefficients of each tensor, summed."""
    total = torch.zeros(())
    for each in coefficients:
        flat = each.flatten(1) if each.ndim > 1 else each.unsqueeze(1)
        total = total.to(each) + torch.linalg.vector_norm(flat, order, dim=1).sum()
    return total


def sum_to(total: float, coefficients: torch.Tensor) -> torch.Tensor:
    """The nearest coefficients whose sum over the sources is a total: ``c_i + (total - sum_j c_j) / N``."""
    return coefficients + (total - coefficients.sum(0)) / len(coefficients)


def penalty(
    coefficients: Sequence[torch.Tensor], factors: Mapping[str, float], weights: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """All penalties with their factors: ``similarity``, ``overlap``, ``weighted_overlap``, ``l1`` and ``l2``."""
    made = {
        "similarity": lambda: similarity(coefficients),
        "overlap": lambda: overlap(coefficients),
        "weighted_overlap": lambda: overlap(coefficients, weights),
        "l1": lambda: norms(coefficients, 1),
        "l2": lambda: norms(coefficients, 2),
    }
    terms = [factor * made[name]() for name, factor in factors.items() if factor]
    return torch.stack(terms).sum() if terms else torch.zeros(())
