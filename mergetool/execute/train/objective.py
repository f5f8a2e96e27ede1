"""What training looks at: how far the merged model is from each teacher on some of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch

from mergetool.execute.train.rows import Stream, counted, join
from mergetool.execute.train.settings import Settings
from mergetool.execute.train.student import Student
from mergetool.execute.train.teachers import Targets, part
from mergetool.facts.dam import Slot
from mergetool.facts.dam_losses import LOSSES, Loss, Target
from mergetool.facts.dam_penalties import marginals, penalty, sum_to

Values = Mapping[str, torch.Tensor]
"""What is trained, by the keys of the slots."""


@dataclass(frozen=True)
class Objective:
    """The merged model, its teachers and their data.

    Attributes:
        student: the merged model.
        slots: the coefficients of every weight, by its name on disk.
        streams: each source's data.
        targets: what each source predicts on its data.
        settings: how coefficients are trained.
        start: the coefficient of what is not trained.
        interference: what multiplies the overlap of each trained set; None where overlaps are not weighted.
    """

    student: Student
    slots: Mapping[str, Slot]
    streams: Sequence[Stream]
    targets: Sequence[Targets]
    settings: Settings
    start: float
    interference: Sequence[torch.Tensor] | None = None
    _fixed: dict[str, torch.Tensor] = field(default_factory=dict)

    def coefficients(self, values: Values, name: str) -> tuple[torch.Tensor, ...]:
        """The sets of a weight, trained or as they began."""
        return tuple(self._set(values, each) for each in self.slots[name].sets)

    def _set(self, values: Values, slot: Slot) -> torch.Tensor:
        if slot.trained:
            made = values[slot.key]
        else:
            made = self._fixed.setdefault(slot.label, torch.full(slot.coefficients(len(self.streams)), self.start))
        return sum_to(0.0 if slot.added else 1.0, made) if self.settings.sum_to_one else made

    def gradients(self, values: Values, step: int) -> tuple[list[float], float]:
        """Add the gradient of a step's loss and penalties to the values' own.

        Returns:
            Each source's mean loss of a position, and the penalties.
        """
        weights = self.student.weights(partial(self.coefficients, values))
        places = {stream.number: stream.step(step) for stream in self.streams}
        wanted = {number: self.targets[number].of(chosen) for number, chosen in places.items()}
        losses = [0.0] * len(self.streams)
        for parts in self._passes(weights, places, wanted, self.settings.loss):
            means = [summed / len(wanted[owner].logits) for owner, summed, _ in parts]
            for (owner, _, _), mean in zip(parts, means, strict=True):
                losses[owner] += float(mean.detach())
            torch.stack(means).sum().backward()
        seen = [marginals(s, self.coefficients(values, name)) for name, s in self.slots.items() if s.trained]
        trained = [each for sets in seen for each in sets]
        extra = penalty(trained, self.settings.penalties, self.interference)
        if extra.requires_grad:
            extra.backward()
        return losses, float(extra.detach())

    def held_out(self, values: Values) -> list[float]:
        """The mean KL of a position on each source's held-out rows, whatever loss is trained for."""
        with torch.no_grad():
            return self._held_out(values)

    def _held_out(self, values: Values) -> list[float]:
        weights = self.student.weights(partial(self.coefficients, values))
        totals, counts = [0.0] * len(self.streams), [0] * len(self.streams)
        for stream in self.streams:
            for start in range(0, len(stream.held_out), stream.at_once):
                places = {stream.number: stream.held_out[start : start + stream.at_once]}
                wanted = {number: self.targets[number].of(chosen) for number, chosen in places.items()}
                for parts in self._passes(weights, places, wanted, "kl"):
                    for owner, summed, positions in parts:
                        totals[owner] += float(summed)
                        counts[owner] += positions
        return [total / max(1, count) for total, count in zip(totals, counts, strict=True)]

    def _passes(
        self,
        weights: Mapping[str, torch.Tensor],
        places: Mapping[int, Sequence[int]],
        wanted: Mapping[int, Target],
        loss: Loss,
    ) -> Iterator[list[tuple[int, torch.Tensor, int]]]:
        """For each forward pass: whose rows were in it, the sum of their losses, and of how many positions."""
        owners = [number for number, chosen in places.items() for _ in chosen]
        seen = dict.fromkeys(places, 0)
        for batch in join([self.streams[number].rows[place] for number, chosen in places.items() for place in chosen]):
            logits = self.student.logits(weights, batch)
            mask, here, begin, parts = counted(batch, logits), owners[: len(logits)], 0, []
            owners = owners[len(logits) :]
            for owner, group in groupby(here):
                end = begin + len(list(group))
                picked = logits[begin:end][mask[begin:end]]
                target = _on(part(wanted[owner], seen[owner], seen[owner] + len(picked)), picked)
                summed = LOSSES[loss](picked, target, self.settings.temperature).sum()
                parts.append((owner, summed, len(picked)))
                begin, seen[owner] = end, seen[owner] + len(picked)
            yield parts


def _on(target: Target, like: torch.Tensor) -> Target:
    return Target(
        target.logits.to(like),
        None if target.indices is None else target.indices.to(like.device),
        None if target.rest is None else target.rest.to(like),
    )
