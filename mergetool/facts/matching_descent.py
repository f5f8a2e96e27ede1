"""Coordinate descent over groups of units: what is solved at once, in which order, and when a move is worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy.symmetry import Group, Indices, Permutations, Turning, identity
from mergetool.errors import NonFinite
from mergetool.kernels.assign import assign, worthwhile

Array = NDArray[Any]
Get = Callable[[str], Array]
"""The tensor of this name, as float32 or float64, in the shape on disk."""
DEFAULT_MARGIN = 0.01
"""Permutations must gain this share of a perfect match over the identity: a fine-tune then stays where it is."""
DEFAULT_SWEEPS = 100
"""The most sweeps over a component; two or three are usual."""
_CONVERGED = 1e-9


@dataclass(frozen=True)
class Match:
    """What was found for one group; scores are shares of what a perfect match of all units would score.

    Attributes:
        group: its name.
        size: how many units it has.
        identity: the score with all units in their own places.
        found: the score with the permutation.
        moved: the share of units that are not in their own places.
    """

    group: str
    size: int
    identity: float
    found: float
    moved: float

    @property
    def gain(self) -> float:
        """How much better the permutation is than none."""
        return self.found - self.identity


@dataclass(frozen=True)
class Matching:
    """Permutations that turn the other model to face the reference.

    Attributes:
        permutations: an index array for every group, also for those that keep their order.
        matches: what each is worth, in the order of the groups.
        sweeps: how many times the groups were gone over, at most.
    """

    permutations: Permutations
    matches: tuple[Match, ...] = ()
    sweeps: int = 1


@dataclass(frozen=True)
class Score:
    """How alike the units of a group are.

    Attributes:
        scores: [size, size], of the reference's i and the other's j.
        left: [size], the norm of each unit of the reference; a perfect match scores ``left[i] * right[j]``.
        right: [size], that of the other's.
    """

    scores: Array
    left: Array
    right: Array

    def share(self, order: Indices) -> float:
        """The score of a permutation as a share of perfect matches."""
        whole = float(self.left @ self.right[order])
        return float(self.scores[identity(len(order)), order].astype(np.float64).sum()) / whole if whole else 0.0

    def nearest(self) -> Indices:
        """The best permutation; found in one pass where every unit has a partner of its own that is nearest to it.

        Half of ``right²`` off each column costs every permutation the same, and leaves a row's entries in the order of
        their distances: as they are, all rows may have their largest entries in the columns of a few strong units.
        """
        if np.ptp(self.right) == 0:  # nothing to tell columns apart by
            return assign(self.scores)
        return assign(self.scores - np.square(self.right) / 2)


@dataclass
class State:
    """Permutations as far as they are known, while a set of groups is being solved."""

    groups: Mapping[str, Group]
    permutations: dict[str, Indices]
    margin: float
    matches: dict[str, Match] = field(default_factory=dict)
    improved: bool = False

    def turning(self, without: Iterable[str] = ()) -> Turning:
        """All permutations but those of some groups, which count as the identity."""
        left_out = set(without)
        known = {name: order for name, order in self.permutations.items() if name not in left_out}
        return Turning(self.groups.values(), known)

    def settle(self, group: Group, score: Score, order: Indices | None = None) -> Indices:
        """Take the best permutation, or ``order``, as far as it is worth a move, and note what it gains."""
        here = identity(group.size)
        check_finite(score.scores, group)
        order = assign(score.scores) if order is None else order
        order = worthwhile(score.scores, order, score.left * score.right[order], self.margin)
        before = self.permutations.get(group.name, here)
        found = score.share(order)
        if not np.array_equal(order, before) and found > score.share(before) + _CONVERGED:
            self.improved = True
        moved = float(np.mean(order != here))
        self.matches[group.name] = Match(group.name, group.size, score.share(here), found, moved)
        self.permutations[group.name] = order
        return order


Solver = Callable[[State, Sequence[Group]], None]


def check_finite(scores: Array, group: Group) -> None:
    """Refuse scores that come from broken weights or data.

    Raises:
        NonFinite: there is a NaN or an infinity.
    """
    if not np.isfinite([scores.min(), scores.max()]).all():  # both are NaN if one score is
        what = f"there is a NaN or an infinity in what {group.name} is matched by"
        raise NonFinite(what, fix="check both models with `mergetool verify`")


def components(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Sets of groups that share tensors, in the order of their first groups: each can be solved alone."""
    parent = list(range(len(groups)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    first: dict[str, int] = {}
    for at, group in enumerate(groups):
        # An expert's hidden units have tensors in common with the order of the experts, and with it only.
        for tensor in group.tensors:
            here, there = root(at), root(first.setdefault(tensor, at))
            parent[max(here, there)] = min(here, there)
    sets: dict[int, list[Group]] = {}
    for at, group in enumerate(groups):
        sets.setdefault(root(at), []).append(group)
    yield from sets.values()


def steps(groups: Sequence[Group]) -> list[list[Group]]:
    """What is solved at once: the heads of an attention, or one group; outer groups come before inner ones."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        key = f"{group.module} heads" if group.kind == "heads" else group.name
        found.setdefault(key, []).append(group)
    return list(found.values())


def descend(state: State, groups: Sequence[Group], solve: Solver, seed: int, max_sweeps: int) -> int:
    """Coordinate descent over one component, in an order drawn from the seed; returns the number of sweeps.

    It ends when a sweep improves nothing. A component of a single module is done after one: its outer groups are
    compared by what the inner ones do not alter, and the inner ones not with each other.
    """
    modules: dict[str, list[list[Group]]] = {}
    for step in steps(groups):
        modules.setdefault(step[0].module or step[0].name, []).append(step)
    random = np.random.default_rng([seed, len(groups)])
    for sweep in range(1, max_sweeps + 1):
        state.improved = False
        for at in random.permutation(len(modules)):
            # Within a module the order is fixed: values are compared head by head, so heads come first.
            for step in list(modules.values())[at]:
                solve(state, step)
        if not state.improved or len(modules) == 1:
            return sweep
    return max_sweeps


def match_all(
    groups: Sequence[Group],
    solver: Callable[[list[Group]], Solver],
    fixed: Permutations,
    seed: int,
    max_sweeps: int,
    margin: float,
) -> Matching:
    """Solve every component with a solver of its own, so that what one has read is gone before the next."""
    permutations: dict[str, Indices] = {}
    matches: dict[str, Match] = {}
    most = 0
    for component in components(groups):
        known = {group.name: group for group in component}
        state = State(known, {name: order for name, order in fixed.items() if name in known}, margin)
        free = [group for group in component if group.name not in fixed]
        if free:
            most = max(most, descend(state, free, solver(component), seed, max_sweeps))
        permutations.update(
            {group.name: state.permutations.get(group.name, identity(group.size)) for group in component}
        )
        matches.update(state.matches)
    ordered = tuple(matches[group.name] for group in groups if group.name in matches)
    return Matching({group.name: permutations[group.name] for group in groups}, ordered, most)
