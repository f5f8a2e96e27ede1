"""DARE: drop random entries of each delta, rescale the rest; then add them up, or elect signs as TIES does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mergetool.kernels.language import where
from mergetool.methods.declare import REQUIRED, Doc, PerSource, Sums, method
from mergetool.methods.shared import Density, Lambda, Weight, normalized
from mergetool.methods.ties import elect

CITATION = (
    "Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, ICML 2024"
)
DIFFERS = (
    "`rescale: true` is the paper's 1/density; mergekit's rescale keeps the sum of magnitudes of each tensor instead, "
    "which is `rescale: l1` here. Masks come from a counter-based generator, so they depend on the seed, the source "
    "and the tensor alone; they are not mergekit's masks for the same seed."
)
Rescale = Annotated[
    Literal[True, False, "l1"],
    Doc("How what is kept makes up for what is dropped: true divides by the density, l1 keeps each sum of magnitudes."),
]


def magnitudes(delta: Any, chance: Any, *, density: Any) -> Any:
    """For each source, its magnitude and the part of it that is kept."""
    everything = tuple(abs(delta[i]) for i in range(len(delta)))
    kept = tuple(where(chance[i] < density[i], abs(delta[i]), 0.0) for i in range(len(delta)))
    return (*everything, *kept)


def factors(
    sums: tuple[float, ...] | None, *, density: PerSource[float], rescale: Any, **rest: Any
) -> tuple[float, ...]:
    """Return the factor of each source's kept entries; 1 where nothing is dropped, nothing is left or nothing asked."""
    if rescale is False:
        return tuple(1.0 for _ in density)
    if rescale is True:
        return tuple(1.0 / d if d > 0.0 else 1.0 for d in density)
    assert sums is not None
    pairs = zip(density, sums[: len(density)], sums[len(density) :], strict=True)
    return tuple(1.0 if d >= 1.0 or min(a, k) < 1e-7 else a / k for d, a, k in pairs)


SCALE = Sums(terms=magnitudes, finish=factors, needed=lambda *, rescale, **rest: rescale == "l1")


@method(
    title="DARE",
    paper="arXiv:2311.03099",
    citation=CITATION,
    base="required",
    measures={"scale": SCALE},
    differs=DIFFERS,
)
def dare_linear(
    base: Any,
    delta: Any,
    chance: Any,
    scale: Any,
    *,
    weight: Weight = REQUIRED,
    density: Density = 1.0,  # type: ignore[assignment]
    rescale: Rescale = True,
    normalize: Annotated[bool, Doc("Divide by the sum of the weights, unless that is zero.")] = False,
    lambda_: Lambda = 1.0,
) -> Any:
    """Drop random entries of each delta, scale up the rest, and add the deltas to the base.

    Works while deltas are small (fine-tunes, not continued pre-training). The paper keeps as little as 10 %.

        kept[i] = delta[i] · scale[i] with probability density[i], else 0
        merged = base + lambda · Σ weight[i] · kept[i]
    """
    total = 0.0
    for i in range(len(delta)):
        total += (weight[i] * scale[i]) * where(chance[i] < density[i], delta[i], 0.0)
    return base + normalized(lambda_, weight, normalize) * total


@method(
    title="DARE-TIES",
    paper="arXiv:2311.03099",
    citation=CITATION,
    base="required",
    measures={"scale": SCALE},
    differs=DIFFERS,
)
def dare_ties(
    base: Any,
    delta: Any,
    chance: Any,
    scale: Any,
    *,
    weight: Weight = REQUIRED,
    density: Density = 1.0,  # type: ignore[assignment]
    rescale: Rescale = True,
    normalize: Annotated[bool, Doc("Divide by the sum of the weights that agree.")] = False,
    lambda_: Lambda = 1.0,
) -> Any:
    """Drop random entries of each delta, scale up the rest, then elect signs and add what agrees.

    DARE's sparse deltas with the sign election of TIES (arXiv:2306.01708).

        kept[i] = delta[i] · scale[i] with probability density[i], else 0
        elected = sign(Σ weight[i] · kept[i])
        merged = base + lambda · Σ' weight[i] · kept[i]   (Σ' over sources of the elected sign)
    """
    kept = tuple(where(chance[i] < density[i], delta[i] * scale[i], 0.0) for i in range(len(delta)))
    return base + lambda_ * elect(kept, weight, normalize)
