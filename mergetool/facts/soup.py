"""Greedy soup: which of several models to average, found by trying (arXiv:2203.05482, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Members = tuple[int, ...]
"""The models of an average, ascending."""


@dataclass(frozen=True)
class Soup:
    """Which models were chosen, and everything that was tried.

    Attributes:
        members: the models of the soup.
        best: the model that is best alone.
        tried: the loss of every average that was tried, in that order; models alone come first.
    """

    members: Members
    best: int
    tried: Mapping[Members, float]

    @property
    def loss(self) -> float:
        """The loss of the soup: never more than that of the best model alone."""
        return self.tried[self.members]


def greedy(count: int, loss: Callable[[Members], float]) -> Soup:
    """Begin with the best model and add each next best, if their mean is no worse with it than without it.

    A model that changes nothing is added, as published. Of models that are as good as each other the first comes
    first. A mean whose loss is no number is worse than any.

    Args:
        count: how many models there are.
        loss: what the mean of some of them loses; the less the better. That of a model alone must be a number.
    """
    tried: dict[Members, float] = {(i,): loss((i,)) for i in range(count)}
    best, *others = sorted(range(count), key=lambda i: tried[i,])
    members: Members = (best,)
    for other in others:
        wider = tuple(sorted((*members, other)))
        tried[wider] = loss(wider)
        if tried[wider] <= tried[members]:
            members = wider
    return Soup(members, best, tried)


def evaluations(count: int) -> int:
    """How many averages of so many models are tried."""
    return 2 * count - 1


def reads(count: int) -> int:
    """How many models are read for them, at most: each alone, then two, three, and in the end all."""
    return count * (count + 3) // 2 - 1
