"""A merged weight that torch can differentiate by its coefficients, with one source's weight in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from types import EllipsisType
from typing import Any, Protocol

import torch

from mergetool.errors import Problem, ShapeMismatch
from mergetool.facts.dam import Slot

Run = slice | EllipsisType
_PIECE = 1 << 20  # entries of a delta


class Weights(Protocol):
    """A model's weights, read when asked for."""

    def get(self, name: str) -> torch.Tensor:
        """The weight of this name on disk, of any dtype, on any device."""


@dataclass(frozen=True)
class Reads:
    """The weights that one merged weight is made of.

    Attributes:
        slot: its coefficients.
        sources: the models whose weights, or deltas, are weighed.
        base: the model that deltas are taken from; None for the form ``full``.
        device: where the merged weight is made.
        dtype: what it is made in.
    """

    slot: Slot
    sources: Sequence[Weights]
    base: Weights | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def start(self) -> torch.Tensor | None:
        """The base's weight; None without a base."""
        return None if self.base is None else self._read(self.base, "the base")

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each source's weight, or its delta, one after the other.

        Raises:
            ShapeMismatch: a source has another shape than the slot.
        """
        base = self.start()
        for number, source in enumerate(self.sources):
            tensor = self._read(source, f"source {number}")
            yield tensor if base is None else tensor - base

    def runs(self, base: torch.Tensor | None) -> Iterator[tuple[int, Run, torch.Tensor]]:
        """Each source's weight or delta, a run of the first axis at a time, so that no delta is there as a whole.

        Args:
            base: what :meth:`start` gave.

        Yields:
            The source's number, which run, and its weight or delta there.

        Raises:
            ShapeMismatch: a source has another shape than the slot.
        """
        for number, source in enumerate(self.sources):
            tensor = self._read(source, f"source {number}")
            for run in _runs(self.slot.shape):
                yield number, run, tensor[run] if base is None else tensor[run] - base[run]
            del tensor  # before the next source's is read

    def _read(self, source: Weights, label: str) -> torch.Tensor:
        tensor = source.get(self.slot.name)
        if tuple(tensor.shape) != self.slot.shape:
            what = f"has shape {tuple(tensor.shape)} in {label}, {self.slot.shape} expected"
            raise ShapeMismatch(Problem(what, self.slot.name, "merge models of one architecture"))
        return tensor.detach().to(self.device, self.dtype)


class _Merged(torch.autograd.Function):  # type: ignore[misc]
    """Nothing is saved for the backward pass but where the weights are: it reads them again."""

    @staticmethod
    def forward(ctx: Any, reads: Reads, *coefficients: torch.Tensor) -> torch.Tensor:
        ctx.reads = reads
        slot, count = reads.slot, len(reads.sources)
        factors = [
            (0 in each.axes, values.to(reads.device, reads.dtype).reshape(each.over_weight(count)))
            for each, values in zip(slot.sets, coefficients, strict=True)
        ]
        base = reads.start()
        total = torch.zeros(slot.shape, device=reads.device, dtype=reads.dtype) if base is None else base.clone()
        for source, run, tensor in reads.runs(base):
            first, *added = (values[source][run] if along else values[source] for along, values in factors)
            total[run].addcmul_(tensor, sum(added, first))
            del tensor  # a part of the source's
        ctx.like = [values.detach() for values in coefficients]
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sets, (gradient,) = ctx.reads.slot.sets, gradients
        if not any(ctx.needs_input_grad):
            return (None,) * (1 + len(sets))
        made = [gradient.new_zeros(each.coefficients(len(ctx.reads.sources))) for each in sets]
        for source, run, tensor in ctx.reads.runs(ctx.reads.start()):
            product = gradient[run] * tensor
            for each, values in zip(sets, made, strict=True):
                # Of no axes at all torch would sum over every axis.
                found = product.sum(each.summed) if each.summed else product
                own = values[source]
                if 0 in each.axes:
                    own = own[run]
                own += found
            del tensor, product, found
        return (None, *(values.to(like) for values, like in zip(made, ctx.like, strict=True)))


def _runs(shape: tuple[int, ...]) -> Iterator[Run]:
    """The first axis in runs of about a piece; a single number is one run."""
    if not shape:
        yield ...
        return
    step = max(1, _PIECE // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def merged(coefficients: Sequence[torch.Tensor], reads: Reads) -> torch.Tensor:
    """``W = sum_i W_i diag(c_i)``, or with a base ``W_0 + sum_i D_i diag(c_i)``, differentiable by ``c``.

    With ``G = dL/dW`` the gradient of column j is ``dL/dc_i[j] = sum_o G[o, j] W_i[o, j]``, and of a row that is added
    ``dL/dr_i[o] = sum_j G[o, j] W_i[o, j]``. The sources are read once for the forward and once for the backward pass,
    one at a time; of none is anything kept between the two.

    Args:
        coefficients: for each of the slot's sets [sources, ...], float32 or float64 whatever the weights are.
        reads: the weights, and the dtype and device of the result.

    Raises:
        ShapeMismatch: a weight or the coefficients do not have the shape that the slot says.
    """
    for each, values in zip(reads.slot.sets, coefficients, strict=True):
        wanted = each.coefficients(len(reads.sources))
        if tuple(values.shape) != wanted:
            raise ShapeMismatch(f"the coefficients have shape {tuple(values.shape)}, not {wanted}", each.label)
    result: torch.Tensor = _Merged.apply(reads, *coefficients)
    return result
