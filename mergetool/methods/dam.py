"""DAM: deltas weighted by column and by row, with coefficients trained on a little data of each source."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mergetool.methods.declare import Bounds, Doc, method

Penalty = Annotated[float, Bounds(0.0)]


@method(
    title="DAM",
    paper="arXiv:2410.08371",
    citation="Gauthier-Caron et al., Merging in a Bottle: Differentiable Adaptive Merging (DAM) and the Path from "
    "Averaging to Automation, 2024",
    base="required",
    fewest=2,
    facts={"coefficient": "coefficients"},
    differs="The paper weights whole weights (`whole: true`), by columns alone (`granularity: column`), trains linear "
    "layers only, adds a penalty on similar coefficients and keeps them in bfloat16; here deltas are weighted, by rows "
    "too, embeddings and norms are trained as well, no penalty is on and coefficients are float32: each measured to "
    "recover more (see the guide). Biases begin at 1/N; the released code begins them at 1.",
)
def dam(
    base: Any,
    delta: Any,
    coefficient: Any,
    *,
    granularity: Annotated[
        Literal["row+column", "column", "row", "tensor", "layer"],
        Doc("What shares one coefficient of each source; `row+column` adds that of an entry's row to its column's."),
    ] = "row+column",
    trainable: Annotated[
        Literal["linear+embedding+norm", "linear+embedding", "linear", "embedding"],
        Doc("What is trained; the rest is averaged."),
    ] = "linear+embedding+norm",
    whole: Annotated[bool, Doc("Weight whole weights, as the paper does, not deltas from the base.")] = False,
    loss: Annotated[
        Literal["kl", "js", "mse", "entropy"], Doc("How far the merged model's predictions are from a source's.")
    ] = "kl",
    temperature: Annotated[float, Doc("Softens the predictions that are compared."), Bounds(1e-3)] = 1.0,
    similarity: Annotated[Penalty, Doc("Penalty on coefficients of two sources that point the same way.")] = 0.0,
    overlap: Annotated[Penalty, Doc("Penalty on columns that two sources both want.")] = 0.0,
    weighted_overlap: Annotated[Penalty, Doc("The same, weighted by how much their deltas differ.")] = 0.0,
    l1: Annotated[Penalty, Doc("Penalty on the sum of magnitudes of the coefficients.")] = 0.0,
    l2: Annotated[Penalty, Doc("Penalty on their Euclidean norm.")] = 0.0,
    sum_to_one: Annotated[bool, Doc("Keep the coefficients of all sources at a sum of 1.")] = False,
) -> Any:
    """Add the deltas to the base, by coefficients of columns and rows trained to keep every source's predictions.

    For sources whose skills should all survive when there are a few thousand tokens of each skill at hand. Needs
    `calibration` data and minutes of training; the coefficients are kept, so that merging again costs nothing more.

        merged = base + Σ coefficient[i] · delta[i]
    """
    total = 0.0
    together = 0.0
    for i in range(len(delta)):
        total += coefficient[i] * delta[i]
        together += coefficient[i]
    if whole:
        total = total + (together - 1.0) * base
    return base + total
