"""REPAIR and TACT: factors that give a merged model's units the mean and spread they should have, and how they fold.

Averaging networks that were trained apart shrinks the spread of their activations, more with every layer. Both
methods measure a unit's mean μ and standard deviation σ and put right what the merged model has, z → s·z + shift,

    s = (σ_goal + ε) / (σ_merged + ε),        shift = μ_goal − s·μ_merged,

and differ in the goal alone: REPAIR (arXiv:2211.08403) aims at what the sources have on average, once for the model;
TACT (arXiv:2410.12766) at what the expert of a task has on that task's data, once for every task.

A layer is measured when the layers before it are corrected already, as REPAIR does it; so whoever measures goes from
one step of :func:`mergetool.facts.outputs.outputs` to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import NonFinite, RunError

Vector = NDArray[np.float64]
Statistic = Literal["mean_std", "std"]

CLAMP = 10.0
"""A scale stays within [1/CLAMP, CLAMP]: a unit that hardly moves in the merged model is not blown up."""
DEAD = 1e-6
"""A unit whose spread is below this share of its mean and of its goal's spread does not move at all."""


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the units of one output, float64 [units] each.

    Attributes:
        mean: μ of each unit, over all samples, tokens and pixels that count.
        std: σ of each unit, of the population (divided by n).
        count: how many values of each unit were seen; 0 where nobody knows.
    """

    mean: Vector
    std: Vector
    count: int = 0


@dataclass(frozen=True)
class Factors:
    """What becomes of the units of one output: ``z * scale + shift``, float64 [units] each."""

    scale: Vector
    shift: Vector


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor: ``tensor * scale + shift``, both along one axis; ``None`` leaves it out."""

    axis: int
    scale: Vector | None
    shift: Vector | None

    def __call__(self, tensor: NDArray[Any]) -> NDArray[np.float64]:
        """The edited tensor in float64; ValueError where an axis and its vector differ in length."""
        result = tensor.astype(np.float64)
        if self.scale is not None:
            result = result * _along(self.scale, result, self.axis)
        if self.shift is not None:
            result = result + _along(self.shift, result, self.axis)
        return result

    def tile(self, values: NDArray[np.float64], shape: tuple[int, ...], start: int) -> None:
        """Edit a run of a tensor's coordinates in place, to the same bits as the whole.

        Args:
            values: the run, flat.
            shape: of the whole tensor.
            start: the run's first coordinate.
        """
        inner = math.prod(shape[self.axis + 1 :])
        first, last = start // inner, (start + values.size - 1) // inner
        units, skip = np.arange(first, last + 1) % shape[self.axis], start - first * inner
        for vector, change in ((self.scale, np.multiply), (self.shift, np.add)):
            if vector is not None:
                change(values, np.repeat(vector[units], inner)[skip : skip + values.size], out=values)


def goal(sources: Sequence[Moments], weights: Sequence[float] | None = None) -> Moments:
    """What REPAIR aims at: μ = Σ aᵢ μᵢ and σ = Σ aᵢ σᵢ. Standard deviations are averaged, not variances.

    Args:
        sources: the moments of each source, its units turned to the merged model's order, on the same data.
        weights: the aᵢ; taken as equal shares where absent. A weight below 0 takes away from the mean, and the
            spread never falls below 0.
    """
    if not sources:
        raise ValueError("no sources to take the goal from")
    shares = np.full(len(sources), 1.0 / len(sources)) if weights is None else np.asarray(weights, np.float64)
    mean = np.sum([a * source.mean for a, source in zip(shares, sources, strict=True)], axis=0)
    std = np.sum([a * source.std for a, source in zip(shares, sources, strict=True)], axis=0)
    return Moments(mean, np.maximum(std, 0.0), min(source.count for source in sources))


def factors(
    target: Moments,
    merged: Moments,
    *,
    statistic: Statistic = "mean_std",
    clamp: float = CLAMP,
    samples: int | None = None,
) -> Factors:
    """The factors that take ``merged`` to ``target``: of REPAIR with :func:`goal`, of TACT with an expert's moments.

    A unit that does not move in the merged model has nothing to scale: its scale is 1, and its shift still brings
    its mean home. One that does not move in the target is scaled down, as far as ``clamp`` lets it.

    Args:
        target: what the units should have.
        merged: what they have in the merged model, where everything before them is corrected already.
        statistic: ``std`` leaves the shift out (a unit's mean is scaled with it), so that no bias is needed.
        clamp: the scale stays within [1/clamp, clamp]; at least 1.
        samples: independent samples (texts, images) behind the moments: with few of them scales are drawn to 1
            by ε = σ̄ / 2n, σ̄ the mean of the target's spreads. ``None``: there are enough, ε = 0.

    Raises:
        NonFinite: a mean or a spread is NaN or infinite.
        RunError: target and merged differ in their number of units.
    """
    _check(target, merged, clamp)
    epsilon = 0.0 if samples is None else float(np.mean(target.std, dtype=np.float64)) / (2.0 * max(samples, 1))
    dead = merged.std <= DEAD * np.maximum(np.abs(merged.mean), target.std)
    below = np.where(dead, 1.0, merged.std + epsilon)
    scale = np.where(dead, 1.0, np.clip((target.std + epsilon) / below, 1.0 / clamp, clamp))
    shift = target.mean - scale * merged.mean if statistic == "mean_std" else np.zeros_like(scale)
    return Factors(scale, shift)


def fold(
    weight: NDArray[Any], bias: NDArray[Any] | None, correction: Factors, axis: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fold a correction of a layer's outputs into it: W ← diag(s) W, b ← s∘b + shift.

    Args:
        weight: a linear's [out, in], a convolution's [out, in, ...], a norm's [units]; [in, out] with ``axis`` 1.
        bias: [out]; taken as zeros where absent.
        correction: the factors of the layer's outputs, before the activation.
        axis: the axis of ``weight`` that runs over the outputs.

    Returns:
        Weight and bias in float64.
    """
    start = np.zeros_like(correction.shift) if bias is None else bias
    return Edit(axis, correction.scale, None)(weight), Edit(0, correction.scale, correction.shift)(start)


def fold_into_reader(
    weight: NDArray[Any], bias: NDArray[Any] | None, correction: Factors, axis: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fold a correction into the layer that reads it: W ← W diag(s), b ← b + W shift.

    So the correction of the final representation, which TACT publishes, becomes part of a task's own head.

    Args:
        weight: the head's [out, in]; [in, out] with ``axis`` 0.
        bias: [out]; taken as zeros where absent.
        correction: the factors of what the head reads.
        axis: the axis of ``weight`` that runs over the inputs.

    Returns:
        Weight and bias in float64.
    """
    added = np.tensordot(weight.astype(np.float64), correction.shift, axes=([axis], [0]))
    return Edit(axis, correction.scale, None)(weight), added if bias is None else bias + added


def batch_norm(merged: Moments) -> tuple[Vector, Vector]:
    """Fresh running mean and variance of a batch norm: in networks that have them this is all of REPAIR.

    The variance is the unbiased one, as ``torch.nn.BatchNorm2d`` keeps it.

    Args:
        merged: the moments of what the norm reads in the merged model; ``count`` values of each channel.
    """
    unbiased = merged.count / (merged.count - 1) if merged.count > 1 else 1.0
    return merged.mean, merged.std**2 * unbiased


def spread_ratio(target: Moments, merged: Moments) -> float:
    """The mean of σ_merged / σ_target over the units that move in the target: 1 where no variance has collapsed."""
    moving = target.std > DEAD * np.maximum(np.abs(target.mean), np.mean(target.std))
    return float(np.mean(merged.std[moving] / target.std[moving])) if moving.any() else 1.0


def _along(vector: Vector, tensor: NDArray[Any], axis: int) -> NDArray[np.float64]:
    """The vector, shaped to run along one axis of the tensor."""
    if tensor.shape[axis] != len(vector):
        raise ValueError(f"axis {axis} of a tensor of shape {tensor.shape} has no {len(vector)} units")
    return vector.reshape([-1 if each == axis % tensor.ndim else 1 for each in range(tensor.ndim)])


def _check(target: Moments, merged: Moments, clamp: float) -> None:
    if clamp < 1.0:
        raise ValueError(f"clamp must be at least 1, not {clamp}")
    shapes = {values.shape for each in (target, merged) for values in (each.mean, each.std)}
    if len(shapes) != 1:
        raise RunError(
            f"the merged model's output and its goal differ in their units: {sorted(shapes)}",
            fix="measure them on models of one architecture",
        )
    for name, each in (("goal", target), ("merged model", merged)):
        wrong = ~(np.isfinite(each.mean) & np.isfinite(each.std))
        if wrong.any():
            unit = int(np.flatnonzero(wrong)[0])
            raise NonFinite(
                f"the {name}'s activations have no finite mean or spread in {int(wrong.sum())} units, {unit} the first",
                fix="look at the model with `mergetool evaluate`: it overflows on the calibration data",
            )
