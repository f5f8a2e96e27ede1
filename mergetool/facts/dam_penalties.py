"""Penalties on DAM's coefficients themselves: similarity, overlap, L1, L2; and coefficients that sum to one.

Coefficients are given tensor by tensor, [sources, ...]; penalties are summed over the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch.nn.functional import cosine_similarity

from mergetool.facts.dam_merge import Reads


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


def sum_to_one(coefficients: torch.Tensor) -> torch.Tensor:
    """The nearest coefficients whose sum over the sources is one: ``c_i + (1 - sum_j c_j) / N``."""
    return coefficients + (1.0 - coefficients.sum(0)) / len(coefficients)


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
