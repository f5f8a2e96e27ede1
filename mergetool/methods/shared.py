"""Parameters and checks that several methods declare."""

from __future__ import annotations

from typing import Annotated, Any

from mergetool.methods.declare import Doc, Fraction, PerSource

Weight = Annotated[PerSource[float], Doc("The factor of each source.")]
Density = Annotated[PerSource[Fraction], Doc("The share of each delta that is kept.")]
Lambda = Annotated[float, Doc("The factor of the merged delta.")]
Normalize = Annotated[bool, Doc("Divide by the sum of the weights.")]

SMALLEST_SUM = 1e-8
"""A sum of weights nearer to zero than this is not divided by."""


def weights_sum(weight: tuple[float, ...], normalize: bool, **rest: Any) -> list[tuple[str, str]]:
    """Refuse weights that cannot be normalised."""
    if normalize and abs(sum(weight)) < SMALLEST_SUM:
        return [("weight", "the weights sum to zero, so they cannot be normalised")]
    return []


def normalized(factor: Any, weight: Any, normalize: Any) -> Any:
    """Return the factor of a weighted sum, divided by the sum of the weights if asked, unless that is zero."""
    if normalize:
        divisor = 0.0
        for i in range(len(weight)):
            divisor += weight[i]
        if abs(divisor) >= SMALLEST_SUM:
            factor = factor / divisor
    return factor
