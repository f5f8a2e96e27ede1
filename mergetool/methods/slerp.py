"""SLERP: walk along the arc from the base to the other model."""

from __future__ import annotations

import math
from typing import Annotated, Any

from mergetool.methods.declare import REQUIRED, Doc, Fraction, Sums, method

NEARLY_PARALLEL = 0.9995
"""A cosine above which the arc is taken for a straight line."""
SMALLEST_NORM = 1e-8
"""A vector shorter than this has no direction."""


def products(base: Any, value: Any) -> Any:
    """Return the Gram matrix of the two ends, coordinate by coordinate."""
    return base * base, base * value[0], value[0] * value[0]


def arc_weights(sums: tuple[float, ...], *, t: float, **rest: Any) -> tuple[float, ...]:
    """Return the factors of the two ends, from the Gram matrix of the two flattened tensors."""
    norm_a, norm_b = math.sqrt(sums[0]), math.sqrt(sums[2])
    scale_a = norm_a if norm_a > SMALLEST_NORM else 1.0
    scale_b = norm_b if norm_b > SMALLEST_NORM else 1.0
    cosine = max(-1.0, min(1.0, sums[1] / (scale_a * scale_b)))
    angle = math.acos(cosine)
    if abs(cosine) > NEARLY_PARALLEL or math.sin(angle) == 0.0:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@method(
    title="SLERP",
    paper="https://doi.org/10.1145/325334.325242",
    citation="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    base="required",
    fewest=1,
    most=1,
    measures={"factor": Sums(terms=products, finish=arc_weights)},
    differs="As in mergekit, the arc's factors are applied to the vectors themselves, not to unit vectors, so the "
    "norm is interpolated only roughly; and nearly parallel tensors (|cos| > 0.9995, as most fine-tunes of one base "
    "are) are interpolated linearly.",
)
def slerp(
    base: Any,
    value: Any,
    factor: Any,
    *,
    t: Annotated[Fraction, Doc("How far to go from the base (0) to the other model (1).")] = REQUIRED,
) -> Any:
    """Walk along the arc from the base to the other model, each tensor one vector.

    For two models of equal standing. On fine-tunes of one base it is nearly the same as linear.

        angle = arccos⟨base, value⟩ / (‖base‖ ‖value‖)
        merged = sin((1 - t) · angle) / sin(angle) · base + sin(t · angle) / sin(angle) · value
    """
    return factor[0] * base + factor[1] * value[0]
