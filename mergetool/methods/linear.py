"""Model soup: the weighted mean of the sources."""

from __future__ import annotations

from typing import Any

from mergetool.methods.declare import REQUIRED, method
from mergetool.methods.shared import Normalize, Weight, weights_sum


@method(
    title="Linear (model soup)",
    paper="arXiv:2203.05482",
    citation="Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy "
    "without increasing inference time, ICML 2022",
    base="ignored",
    checks=weights_sum,
    differs="mergekit asks a base_model that is not among the models for a weight; here it only lends its config "
    "and tokenizer.",
)
def linear(value: Any, *, weight: Weight = REQUIRED, normalize: Normalize = True) -> Any:
    """Take the weighted mean of the sources.

    The place to start with fine-tunes of one base: cheap, robust, and hard to beat when the sources agree.

        merged = Σ weight[i] · value[i]  / Σ weight[i]   (the division only with ``normalize``)
    """
    divisor = 1.0
    if normalize:
        divisor = 0.0
        for i in range(len(value)):
            divisor += weight[i]
    total = 0.0
    for i in range(len(value)):
        total += (weight[i] / divisor) * value[i]  # one division for all coordinates: it is the same everywhere
    return total
