"""TIES: trim each delta, elect a sign for every weight, average the deltas that agree."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mergetool.kernels.language import where
from mergetool.methods.declare import REQUIRED, Cut, Doc, method
from mergetool.methods.shared import Density, Lambda, Weight


def elect(delta: Any, weight: Any, normalize: Any) -> Any:
    """Sum the weighted deltas that have the sign of their total; ``normalize`` divides by the weights that agree."""
    total = 0.0
    for i in range(len(delta)):
        total += weight[i] * delta[i]
    elected = where(total >= 0.0, 1.0, -1.0)
    agreed = 0.0
    divisor = 0.0
    for i in range(len(delta)):
        term = weight[i] * delta[i]
        agrees = term * elected > 0.0  # a trimmed delta agrees with neither sign
        agreed += where(agrees, term, 0.0)
        divisor += where(agrees, weight[i], 0.0)
    if normalize:
        agreed = agreed / where(divisor == 0.0, 1.0, divisor)
    return agreed


@method(
    title="TIES",
    paper="arXiv:2306.01708",
    citation="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023",
    base="required",
    measures={"cut": Cut()},
    differs="The paper trims over the whole model (`scope: model`) and elects without weights; mergekit trims each "
    "tensor (`scope: tensor`, the default here too) and elects by the weighted deltas, as here. With equal weights "
    "the election is the paper's, except that a total of exactly zero elects plus. Ties at the cut are kept.",
)
def ties(
    base: Any,
    delta: Any,
    cut: Any,
    *,
    weight: Weight = REQUIRED,
    density: Density = 1.0,  # type: ignore[assignment]
    scope: Annotated[
        Literal["tensor", "model"], Doc("Whether density is a share of each tensor or of the whole model.")
    ] = "tensor",
    normalize: Annotated[bool, Doc("Divide by the sum of the weights that agree.")] = True,
    rescale: Annotated[
        Literal[False], Doc("Only false: mergekit's true, which makes up for what is trimmed, is not supported yet.")
    ] = False,
    lambda_: Lambda = 1.0,
) -> Any:
    """Trim each delta to its largest entries, elect a sign for every weight, average the deltas that agree.

    For several fine-tunes of one base whose deltas interfere. The paper keeps the largest 20 % (``density: 0.2``).

        trimmed[i] = delta[i] where |delta[i]| ≥ cut[i], else 0
        elected = sign(Σ weight[i] · trimmed[i])
        merged = base + lambda · Σ' weight[i] · trimmed[i] / Σ' weight[i]   (Σ' over sources of the elected sign)
    """
    trimmed = tuple(where(abs(delta[i]) >= cut[i], delta[i], 0.0) for i in range(len(delta)))
    return base + lambda_ * elect(trimmed, weight, normalize)
