"""Statistics of what is seen while a network runs, kept for one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mergetool.errors import PlanError
from mergetool.execute.forward.places import Place
from mergetool.execute.forward.watch import Seen, Told, Watch
from mergetool.facts.cka import accumulate_hsic, empty_hsic, finish_hsic
from mergetool.facts.statistics import (
    State,
    Statistic,
    accumulate_cross,
    accumulate_inner,
    empty_cross,
    empty_inner,
    finish_cross,
    finish_inner,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run = Callable[[int, Told], None]
Facts = dict[str, "NDArray[Any]"]
KERNEL_ROWS = 256
"""Rows of one CKA kernel, at most: a batch of more is several. The estimate is unbiased for any number, and a row
costs as much as there are others with it."""


def _accumulate_kernels(state: State, first: torch.Tensor, second: torch.Tensor) -> None:
    for x, y in zip(first.split(KERNEL_ROWS), second.split(KERNEL_ROWS), strict=True):
        accumulate_hsic(state, x, y)


_PAIRS: dict[str, tuple[Callable[..., State], Callable[..., None], Callable[[State], State]]] = {
    "cross": (empty_cross, accumulate_cross, finish_cross),
    "inner": (empty_inner, accumulate_inner, finish_inner),
    "cka": (lambda first, second, device: empty_hsic(device), _accumulate_kernels, finish_hsic),
}
"""The statistics of two models: how they begin, what adds rows of both, and what they come to."""


class Tally:
    """The statistics of one model.

    Args:
        statistics: of inputs or outputs.
        watch: what is seen.

    Attributes:
        seen: the names that anything is known of, in this step or before.
    """

    def __init__(self, statistics: Sequence[Statistic], watch: Watch) -> None:
        self.watch = watch
        self.seen: set[str] = set()
        self._of_side = {side: [s for s in statistics if s.side == side] for side in ("input", "output")}
        self._states: dict[tuple[str, str], dict[int | None, tuple[Statistic, State]]] = {}

    def batch(self, runs: Sequence[Run], i: int) -> None:
        """Run a step on a batch and count what is seen."""
        (run,) = runs
        run(i, self._told)

    def _told(self, seen: Seen) -> None:
        for statistic in self._of_side[seen.side]:
            states = self._states.setdefault((statistic.name, seen.name), {})
            if seen.expert not in states:
                states[seen.expert] = statistic, statistic.empty(seen.rows.shape[1], seen.rows.device)
            statistic.accumulate(states[seen.expert][1], seen.rows)

    def finish(self) -> tuple[Facts, Mapping[str, str]]:
        """The facts of the step by their full names and who shares them; the next step begins with none."""
        self._add_unused()
        facts: Facts = {}
        self.seen.update(name for _, name in self._states)
        for key in sorted(self._states):
            name, states = key[1], self._states.pop(key)  # it is let go as soon as it is finished
            made = [statistic.finish(state) for _, (statistic, state) in sorted(states.items(), key=_by_expert)]
            for field in made[0]:
                values = [each[field].cpu().numpy() for each in made]
                facts[f"{name}:{field}"] = values[0] if None in states else _stacked(values)
        self.seen.update(name for name, _ in self.watch.seen)
        return facts, {name: leader for name, leader in self.watch.leaders.items() if name != leader}

    def _add_unused(self) -> None:
        """Tell that nothing is known of experts that no token was sent to, where others had some."""
        for place in self.watch.places:
            if place.kind == "stack":
                for side, statistics in self._of_side.items():
                    for statistic in statistics:
                        self._add_empty(place, statistic, self.watch.inputs if side == "input" else self.watch.outputs)

    def _add_empty(self, place: Place, statistic: Statistic, wanted: frozenset[str]) -> None:
        stack = place.module._parameters[place.attribute]
        assert stack is not None  # it was found there
        for column in zip(*place.names, strict=True) if not place.fused else ((name,) for name in place.names[0]):
            known = [self._states[key] for name in column if (key := (statistic.name, name)) in self._states]
            if not known:
                continue
            _, like = next(iter(known[0].values()))
            channels = len(next(value for value in like.values() if value.ndim))
            for name in column:
                if name in wanted:
                    states = self._states.setdefault((statistic.name, name), {})
                    for expert in range(len(stack)) if place.fused else (None,):
                        states.setdefault(expert, (statistic, statistic.empty(channels)))


def _by_expert(item: tuple[int | None, Any]) -> int:
    return -1 if item[0] is None else item[0]


def _stacked(values: list[NDArray[Any]]) -> NDArray[Any]:
    return np.stack(values)


class Pair:
    """A statistic of two models that see the same tokens.

    Args:
        statistic: ``cross``, ``inner`` or ``cka``.
        first: what is seen of one.
        second: what is seen of the other, by the same names.

    Attributes:
        seen: the names that anything is known of, in this step or before.

    Raises:
        PlanError: experts are asked for: each model sends them other tokens.
    """

    def __init__(self, statistic: str, first: Watch, second: Watch) -> None:
        if statistic not in _PAIRS:
            raise ValueError(f"{statistic} is no statistic of two models")
        self.statistic, self.watch, self.second = statistic, first, second
        self.seen: set[str] = set()
        self._states: dict[tuple[str, str], State] = {}
        for place in first.places:
            if place.kind == "stack" and (asked := sorted(place.every & (first.inputs | first.outputs))):
                raise PlanError("is an expert's, and each model sends its experts other tokens", asked[0])

    def batch(self, runs: Sequence[Run], i: int) -> None:
        """Run a step of each model on a batch and count what is seen."""
        rows: dict[tuple[str, str], torch.Tensor] = {}

        def keep(seen: Seen) -> None:
            rows[seen.name, seen.side] = seen.rows

        def meet(seen: Seen) -> None:
            key = seen.name, seen.side
            self._add(key, rows.pop(key), seen.rows)

        runs[0](i, keep)
        runs[1](i, meet)

    def _add(self, key: tuple[str, str], first: torch.Tensor, second: torch.Tensor) -> None:
        empty, accumulate, _ = _PAIRS[self.statistic]
        if key not in self._states:
            self._states[key] = empty(first.shape[1], second.shape[1], first.device)
        accumulate(self._states[key], first, second)

    def finish(self) -> tuple[Facts, Mapping[str, str]]:
        """The facts of the step by their full names and who shares them; the next step begins with none."""
        finish = _PAIRS[self.statistic][2]
        facts = {
            f"{name}:{side}.{field}": value.cpu().numpy()
            for (name, side), state in sorted(self._states.items())
            for field, value in finish(state).items()
        }
        self.seen.update(name for name, _ in self.watch.seen)
        self._states.clear()
        return facts, {name: leader for name, leader in self.watch.leaders.items() if name != leader}
