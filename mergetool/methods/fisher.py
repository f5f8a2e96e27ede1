"""Fisher-weighted mean: every weight by how much each source's predictions depend on it."""

from __future__ import annotations

from typing import Annotated, Any

from mergetool.kernels.language import maximum
from mergetool.methods.declare import Bounds, Doc, method
from mergetool.methods.shared import Weight, weights_sum


def _checks(weight: tuple[float, ...], **rest: Any) -> list[tuple[str, str]]:
    return weights_sum(weight, True)


@method(
    title="Fisher-weighted mean",
    paper="arXiv:2111.09832",
    citation="Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022",
    base="ignored",
    facts={"importance": "squared_gradients"},
    checks=_checks,
    differs="The diagonal is estimated with labels drawn from the model's own predictions, as the paper defines it; "
    "the released code does so too, other ports take the labels of the data.",
)
def fisher(
    value: Any,
    importance: Any,
    *,
    weight: Weight = 1.0,  # type: ignore[assignment]
    floor: Annotated[float, Doc("The least importance that any weight has."), Bounds(1e-30)] = 1e-6,
) -> Any:
    """Take the mean of the sources, every weight of each by its diagonal Fisher information.

    For fine-tunes of one base that changed different weights. Needs `calibration` data and a backward pass for each
    sample; keeps one number a weight of each source. Of a tensor whose gradients are not known, the plain mean.

        merged = Σ weight[i] · F[i] · value[i] / Σ weight[i] · F[i],   F[i] = max(E[(∂ log p / ∂ value[i])²], floor)
    """
    total = 0.0
    divisor = 0.0
    for i in range(len(value)):
        share = weight[i] * maximum(importance[i], floor)
        total += share * value[i]
        divisor += share
    return total / divisor
