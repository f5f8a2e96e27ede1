"""Calibration data as rows: which are held out, which a step takes, and how rows become a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from mergetool.errors import PlanError

Row = Mapping[str, torch.Tensor]
"""Keyword inputs of a forward pass, each [1, ...]; ``counted`` [1, time] may say which positions count."""

COUNTED = "counted"
_NO_INPUTS = (COUNTED, "labels")


def rows(batches: Iterable[Row]) -> list[Row]:
    """The rows of batches whose tensors all have the rows as their first axis."""
    result: list[Row] = []
    for batch in batches:
        count = len(next(iter(batch.values())))
        result += [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(count)]
    return result


def responses(batches: Iterable[Row]) -> list[Row]:
    """The rows of batches with ``labels``, such that only predictions of labelled tokens count: no prompt, no pad.

    The position before a token predicts it, so labels [rows, time] are taken one to the left; -100 labels nothing.
    """
    result: list[Row] = []
    for row in rows(batches):
        wanted = row["labels"][:, 1:] >= 0
        result.append({**row, COUNTED: torch.cat([wanted, wanted.new_zeros(1, 1)], 1)})
    return result


def counted(batch: Row, logits: torch.Tensor) -> torch.Tensor:
    """Which predictions count, as a mask of the logits' axes but the last: pads do not, and prompts where so said."""
    mask = batch.get(COUNTED, batch.get("attention_mask"))
    if mask is None or mask.shape != logits.shape[:-1]:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return mask.to(logits.device, torch.bool)


def inputs(batch: Row, device: torch.device | str) -> dict[str, torch.Tensor]:
    """What the model is called with."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name not in _NO_INPUTS}


def tokens(row: Row) -> int:
    """How long a row is: its tokens with pads, or 1 where it is no text."""
    ids = row.get("input_ids")
    return 1 if ids is None or ids.ndim < 2 else ids.shape[1]


def join(chosen: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
    """As few batches as hold the rows in their order; texts are padded on the right."""
    batches = []
    for _, run in groupby(chosen, _kind):
        group = list(run)
        longest = max(map(tokens, group))
        batches.append({name: torch.cat([_padded(row, name, longest) for row in group]) for name in group[0]})
    return batches


def _kind(row: Row) -> tuple[object, ...]:
    """What rows must have in common to be one batch; texts with a mask may differ in length."""
    padding = "attention_mask" in row and "input_ids" in row
    time = tokens(row)
    return tuple((n, tuple(s if s != time or not padding else -1 for s in t.shape[1:])) for n, t in row.items())


def _padded(row: Row, name: str, longest: int) -> torch.Tensor:
    tensor, time = row[name], tokens(row)
    if "attention_mask" not in row or tensor.ndim < 2 or tensor.shape[1] != time or time == longest:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(1, longest - time, *tensor.shape[2:])], 1)


@dataclass(frozen=True)
class Stream:
    """The data of one source, and the order in which training goes over it.

    Attributes:
        rows: all of them.
        number: which source they belong to.
        trained: the places of the rows that are trained on.
        held_out: the places of the others.
        at_once: how many of them one step takes.
        seed: of the order.
    """

    rows: Sequence[Row]
    number: int
    trained: tuple[int, ...]
    held_out: tuple[int, ...]
    at_once: int
    seed: int

    def step(self, step: int) -> list[int]:
        """The rows of a step: every epoch goes over all of them, in an order of its own."""
        count = len(self.trained)
        places = range(step * self.at_once, (step + 1) * self.at_once)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return [self.trained[orders[place // count][place % count]] for place in places]

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = (
            np.random.default_rng([self.seed, self.number, epoch]).permutation(len(self.trained)).tolist()
        )
        return order


def streams(data: Sequence[Sequence[Row]], held_out: float, batch_tokens: int, seed: int) -> tuple[Stream, ...]:
    """A stream for every source's rows.

    Raises:
        PlanError: a source has no rows, or too few to hold some out.
    """
    result = []
    for number, each in enumerate(data):
        aside = round(held_out * len(each)) if not held_out else max(1, round(held_out * len(each)))
        if len(each) <= aside:
            what = f"has {len(each)} rows of calibration data, {aside} of them held out: none are left to train on"
            raise PlanError(what, f"source {number}", "give more data or longer windows, or hold out nothing")
        # What is held out must not depend on the order of training: another part of the seed's sequence.
        order = np.random.default_rng([seed, number]).permutation(len(each)).tolist()
        at_once = max(1, batch_tokens // len(data) // max(map(tokens, each)))
        result.append(Stream(each, number, tuple(sorted(order[aside:])), tuple(sorted(order[:aside])), at_once, seed))
    return tuple(result)


def digest(data: Sequence[Row]) -> str:
    """What rows hold, as a hexadecimal number."""
    made = hashlib.sha256()
    for row in data:
        for name, tensor in sorted(row.items()):
            made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            made.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:16]
