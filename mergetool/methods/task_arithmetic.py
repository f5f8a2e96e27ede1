"""Task arithmetic: add the sum of the weighted deltas to the base."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mergetool.methods.declare import REQUIRED, Doc, method
from mergetool.methods.shared import Lambda, Weight, normalized


@method(
    title="Task arithmetic",
    paper="arXiv:2212.04089",
    citation="Ilharco et al., Editing models with task arithmetic, ICLR 2023",
    base="required",
)
def task_arithmetic(
    base: Any,
    delta: Any,
    *,
    weight: Weight = REQUIRED,
    normalize: Annotated[bool, Doc("Divide by the sum of the weights, unless that is zero.")] = False,
    rescale: Annotated[Literal[False, True], Doc("No effect, as in mergekit: nothing is trimmed here.")] = False,
    lambda_: Lambda = 1.0,
) -> Any:
    """Add the weighted sum of the deltas to the base.

    The one method that reliably gains on language models. Tune the weights, or ``lambda`` for all of them
    (0.3 to 0.4 for eight tasks); a negative weight takes a skill away.

        merged = base + lambda · Σ weight[i] · delta[i]
    """
    total = 0.0
    for i in range(len(delta)):
        total += weight[i] * delta[i]
    return base + normalized(lambda_, weight, normalize) * total
