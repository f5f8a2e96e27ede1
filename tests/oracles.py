"""Float64 oracles: merge methods, rounding and random numbers written naively from their papers.

Nothing here is fast and nothing here imports mergetool: every function follows its paper line by line on
whole tensors, so that a disagreement with the compiled kernels is a question about the paper, not about two
implementations of one idea. All tensors are float64 arrays; widen stored values first, round once at the
end.

Where papers are ambiguous or the field's recipes mean something else, the rule is stated in the docstring:

(a) *Trim* keeps every element whose float32(|delta|) is at least the k-th largest float32(|delta|), with
    k = max(1, int(density * n)). Elements tied at the threshold are all kept. density >= 1 keeps every
    element, density <= 0 keeps none.
(b) *Election* is weighted: D_i = w_i * delta_i; s = +1 where the sum of D_i is >= 0, else -1; source i agrees
    where sign(D_i) == s (so a zero never agrees); the merged delta is the sum of the agreeing D_i, divided
    under `normalize` by the sum of the agreeing w_i (a sum of exactly 0 counts as 1).
(c) `task_arithmetic` and `dare` without election divide under `normalize` by the sum of all w_i
    (a sum with |.| < 1e-8 counts as 1).
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
PerSource = float | Sequence[float]

COLINEAR = 0.9995  # |cos| above which SLERP becomes LERP


# Shared pieces ------------------------------------------------------------------------------------------


def per_source(value: PerSource, count: int) -> list[float]:
    """One number for every source: a scalar is repeated."""
    if isinstance(value, (int, float)):
        return [float(value)] * count
    values = [float(v) for v in value]
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} sources")
    return values


def deltas_of(base: ArrayLike, sources: Sequence[ArrayLike]) -> list[Array]:
    """tau_t = theta_t - theta_0 (Ilharco et al., arXiv:2212.04089, section 2)."""
    origin = np.asarray(base, dtype=np.float64)
    return [np.asarray(source, dtype=np.float64) - origin for source in sources]


def float32_magnitude(delta: ArrayLike) -> NDArray[np.float32]:
    """float32(|delta|), the magnitude by which the trim ranks elements; too large becomes infinity."""
    with np.errstate(over="ignore", under="ignore"):
        return np.abs(np.asarray(delta, dtype=np.float64)).astype(np.float32)


def cut(delta: ArrayLike, density: float) -> np.float32:
    """The k-th largest float32(|delta|), k = max(1, int(density * n)): the threshold of rule (a)."""
    magnitudes = np.sort(float32_magnitude(delta).ravel())[::-1]
    k = max(1, int(density * magnitudes.size))
    return np.float32(magnitudes[k - 1])


def trim(delta: ArrayLike, density: float) -> Array:
    """Keep the top `density` of the elements by magnitude and reset the rest to zero, by rule (a).

    `keep_topk_reset_rest_to_zero` of TIES (Yadav et al., arXiv:2306.01708, Algorithm 1, step 1).
    """
    delta = np.asarray(delta, dtype=np.float64)
    if density >= 1 or delta.size == 0:
        return delta.copy()
    if density <= 0:
        return np.zeros_like(delta)
    return np.where(float32_magnitude(delta) >= cut(delta, density), delta, 0.0)


def combine(deltas: Sequence[Array], weight: PerSource, normalize: bool) -> Array:
    """Sum of w_i * delta_i, over the sum of w_i under `normalize`, by rule (c)."""
    weights = per_source(weight, len(deltas))
    total = sum((w * d for w, d in zip(weights, deltas, strict=True)), start=np.zeros_like(deltas[0]))
    divisor = sum(weights)
    if not normalize or abs(divisor) < 1e-8:
        divisor = 1.0
    return total / divisor


def elect(deltas: Sequence[Array], weight: PerSource, normalize: bool) -> Array:
    """Elect a sign for every element and combine the sources that agree with it, by rule (b).

    TIES (arXiv:2306.01708, Algorithm 1, steps 2 and 3) with the weights of a recipe taken into both steps.
    """
    weights = per_source(weight, len(deltas))
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    merged = np.zeros_like(deltas[0])
    divisor = np.zeros_like(deltas[0])
    for w, D in zip(weights, weighted, strict=True):
        agrees = np.sign(D) == sign
        merged += np.where(agrees, D, 0.0)
        divisor += np.where(agrees, w, 0.0)
    if not normalize:
        return merged
    return merged / np.where(divisor == 0, 1.0, divisor)


# Methods ------------------------------------------------------------------------------------------------


def linear(sources: Sequence[ArrayLike], weight: PerSource, normalize: bool = True) -> Array:
    """Weighted average of whole models (model soups, Wortsman et al., arXiv:2203.05482, section 2).

    y = sum w_i x_i, over sum w_i under `normalize`. Weights that sum to zero have no average.
    """
    weights = per_source(weight, len(sources))
    total = sum(
        (w * np.asarray(x, dtype=np.float64) for w, x in zip(weights, sources, strict=True)),
        start=np.zeros(np.shape(sources[0])),
    )
    if not normalize:
        return total
    if sum(weights) == 0:
        raise ValueError("weights that sum to zero cannot be normalised")
    return total / sum(weights)


def slerp(a: ArrayLike, b: ArrayLike, t: float) -> Array:
    """Spherical interpolation of two tensors, each flattened to one vector (Shoemake, SIGGRAPH 1985).

    y = sin((1-t)θ)/sinθ · a + sin(tθ)/sinθ · b, with θ the angle between a and b. The coefficients act on the
    vectors as they are, not on unit vectors, so the norm varies between the two norms. Vectors that are
    nearly colinear (|cosθ| > 0.9995, opposite ones included) are interpolated linearly. A vector of norm <=
    1e-8 is not normalised before the cosine is taken.
    """
    a = np.asarray(a, dtype=np.float64)
    b = np.asarray(b, dtype=np.float64)

    def unit(x: Array) -> Array:
        norm = float(np.sqrt(np.sum(x * x)))
        return x / norm if norm > 1e-8 else x

    cosine = float(np.clip(np.sum(unit(a) * unit(b)), -1.0, 1.0))
    if abs(cosine) > COLINEAR:
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return np.sin((1 - t) * theta) / np.sin(theta) * a + np.sin(t * theta) / np.sin(theta) * b


def task_arithmetic(
    base: ArrayLike,
    sources: Sequence[ArrayLike],
    weight: PerSource,
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Array:
    """theta_0 + λ Σ w_i tau_i (Ilharco et al., arXiv:2212.04089, section 2): a sum, not a mean.

    `normalize` divides by Σ w_i, by rule (c).
    """
    return np.asarray(base, dtype=np.float64) + lambda_ * combine(deltas_of(base, sources), weight, normalize)


def ties(
    base: ArrayLike,
    sources: Sequence[ArrayLike],
    weight: PerSource,
    density: PerSource = 1.0,
    lambda_: float = 1.0,
    normalize: bool = True,
) -> Array:
    """TIES on one tensor: trim, elect, disjoint merge (arXiv:2306.01708, Algorithm 1), trimmed per tensor.

    The paper trims over the whole model (`ties_model`) and knows no weights (`ties_paper`); the weighted
    form of rules (a) and (b) is what recipes in the field mean. With equal positive weights and `normalize`
    both forms agree, except where nonzero deltas cancel to exactly zero: there rule (b) elects +, the
    paper's code the majority sign.
    """
    deltas = deltas_of(base, sources)
    trimmed = [trim(d, q) for d, q in zip(deltas, per_source(density, len(deltas)), strict=True)]
    return np.asarray(base, dtype=np.float64) + lambda_ * elect(trimmed, weight, normalize)


def ties_model(
    base: Mapping[str, NDArray[Any]],
    sources: Sequence[Mapping[str, NDArray[Any]]],
    weight: PerSource,
    density: PerSource = 1.0,
    lambda_: float = 1.0,
    normalize: bool = True,
    tied: Mapping[str, str] | None = None,
) -> dict[str, NDArray[Any]]:
    """TIES on a whole model: each source is trimmed over its flattened delta (arXiv:2306.01708).

    One threshold per source, taken by rule (a) over all floating-point tensors together; election and merge
    are elementwise and do not notice the difference. `tied` maps a duplicate to the name that holds its
    weight: a duplicate is not counted again when the threshold is taken, and is trimmed by that same
    threshold. Tensors that are not floating-point take no part and are the base's.
    """
    floating = [name for name, tensor in base.items() if np.issubdtype(tensor.dtype, np.floating)]
    counted = [name for name in floating if name not in (tied or {})]
    trimmed: list[dict[str, Array]] = []
    for source, q in zip(sources, per_source(density, len(sources)), strict=True):
        delta = {name: deltas_of(base[name], [source[name]])[0] for name in floating}
        if q <= 0:
            delta = {name: np.zeros_like(d) for name, d in delta.items()}
        elif q < 1 and counted:
            threshold = cut(np.concatenate([delta[name].ravel() for name in counted]), q)
            delta = {name: np.where(float32_magnitude(d) >= threshold, d, 0.0) for name, d in delta.items()}
        trimmed.append(delta)
    merged: dict[str, NDArray[Any]] = {name: tensor.copy() for name, tensor in base.items()}
    for name in floating:
        change = elect([delta[name] for delta in trimmed], weight, normalize)
        merged[name] = base[name].astype(np.float64) + lambda_ * change
    return merged


def ties_paper(base: ArrayLike, sources: Sequence[ArrayLike], density: PerSource, lambda_: float = 1.0) -> Array:
    """TIES as its paper has it (arXiv:2306.01708, Algorithm 1): no weights, a plain mean of those that agree.

    1. Trim each delta to its top `density`, by rule (a).
    2. Elect γ = sgn(Σ trimmed_t). Where the sum is zero, γ is the majority: the sign of the sum of all
       other γ.
    3. Disjoint merge: the mean of the trimmed values whose sign is γ (0 where there is none).
    4. theta_0 + λ · merged.
    """
    deltas = deltas_of(base, sources)
    trimmed = [trim(d, q) for d, q in zip(deltas, per_source(density, len(deltas)), strict=True)]
    elected = np.sign(sum(trimmed))
    majority = np.sign(np.sum(elected))
    elected = np.where(elected == 0, majority, elected)
    agreeing = [np.where(elected > 0, d > 0, d < 0) for d in trimmed]  # an undecided majority counts as minus
    total = sum(np.where(agrees, d, 0.0) for agrees, d in zip(agreeing, trimmed, strict=True))
    count = np.maximum(sum(agrees.astype(np.float64) for agrees in agreeing), 1.0)
    return np.asarray(base, dtype=np.float64) + lambda_ * total / count


def dare(
    base: ArrayLike,
    sources: Sequence[ArrayLike],
    masks: Sequence[NDArray[np.bool_]],
    weight: PerSource,
    density: PerSource,
    rescale: bool | Literal["l1"] = True,
    consensus: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Array:
    """Drop And REscale (Yu et al., arXiv:2311.03099, section 3), then task arithmetic or TIES's election.

    delta_i = mask_i * tau_i, where mask_i is drawn by the caller: True keeps, with probability `density`,
    the paper's 1 - p. A density >= 1 keeps everything and rescales nothing, whatever the mask; a density <=
    0 keeps nothing.

    rescale True: the paper's 1/(1 - p) = 1/density. "l1": the rule of recipes written for mergekit, which
    restores the L1 norm of the tensor: times Σ|tau| / Σ|mask * tau|, left out when either sum is below
    1e-7. False: none. consensus False is `dare_linear` (rule (c)); True is `dare_ties` (rule (b)).
    """
    kept = [
        drop(tau, mask, q, rescale)
        for tau, mask, q in zip(deltas_of(base, sources), masks, per_source(density, len(sources)), strict=True)
    ]
    merge = elect if consensus else combine
    return np.asarray(base, dtype=np.float64) + lambda_ * merge(kept, weight, normalize)


def drop(delta: ArrayLike, mask: NDArray[np.bool_], density: float, rescale: bool | Literal["l1"] = True) -> Array:
    """Drop and rescale one delta: one source of `dare`."""
    delta = np.asarray(delta, dtype=np.float64)
    if density >= 1:
        return delta.copy()
    if density <= 0:
        return np.zeros_like(delta)
    kept = np.where(mask, delta, 0.0)
    if rescale == "l1":
        before, after = float(np.sum(np.abs(delta))), float(np.sum(np.abs(kept)))
        return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)
    return kept / density if rescale else kept


def greedy_soup(scores: Sequence[float], score: Callable[[list[int]], float]) -> list[int]:
    """The ingredients of a greedy soup (Wortsman et al., arXiv:2203.05482, Algorithm 1), in the order of adding.

    `scores` are ValAcc(theta_i), the more the better; `score` gives ValAcc(average(theta_i for these i)), the indices
    ascending. Models of one score are in their order.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ingredients: list[int] = []
    for i in order:
        if not ingredients or score(sorted([*ingredients, i])) >= score(sorted(ingredients)):
            ingredients.append(i)
    return ingredients


def passthrough(x: ArrayLike, scale: float | None = None) -> Array:
    """The one source, times `scale` if there is one."""
    x = np.asarray(x, dtype=np.float64)
    return x.copy() if scale is None else x * scale


# Rounding to the stored formats -------------------------------------------------------------------------
#
# IEEE 754-2019, section 4.3.1: roundTiesToEven, from the exact value in one step. Going from float64 through
# float32 to a 16-bit format would round twice, and wrongly for values just beside a midpoint.


def round_to_bfloat16(values: ArrayLike) -> NDArray[np.uint16]:
    """The nearest bfloat16 of each float64, as bits. NaN becomes a quiet NaN of the same sign."""
    return _round(values, mantissa=7, exponent=8).astype(np.uint16)


def round_to_float16(values: ArrayLike) -> NDArray[np.uint16]:
    """The nearest binary16 of each float64, as bits. NaN becomes a quiet NaN of the same sign."""
    return _round(values, mantissa=10, exponent=5).astype(np.uint16)


def round_to_float32(values: ArrayLike) -> NDArray[np.uint32]:
    """The nearest binary32 of each float64, as bits. NaN becomes a quiet NaN of the same sign."""
    return _round(values, mantissa=23, exponent=8).astype(np.uint32)


def widen_bfloat16(bits: ArrayLike) -> Array:
    """The values of bfloat16 bits; exact."""
    return _widen(bits, mantissa=7, exponent=8)


def widen_float16(bits: ArrayLike) -> Array:
    """The values of binary16 bits; exact."""
    return _widen(bits, mantissa=10, exponent=5)


def _round(values: ArrayLike, mantissa: int, exponent: int) -> NDArray[np.uint64]:
    flat = np.asarray(values, dtype=np.float64)
    rounded = [_round_one(float(v), mantissa, exponent) for v in flat.ravel()]
    return np.array(rounded, dtype=np.uint64).reshape(flat.shape)


def _round_one(value: float, mantissa: int, exponent: int) -> int:
    """The bits of the nearest number with `mantissa` stored bits and `exponent` exponent bits."""
    sign = int(np.signbit(value)) << (mantissa + exponent)
    infinity = (2**exponent - 1) << mantissa
    if np.isnan(value):
        return sign | infinity | 1 << (mantissa - 1)
    if np.isinf(value):
        return sign | infinity
    exact = abs(Fraction(value))
    if exact == 0:
        return sign
    smallest = 2 - 2 ** (exponent - 1)  # the exponent of the smallest normal number, and of all subnormal ones
    power = max(_floor_log2(exact), smallest)
    steps = round(exact / Fraction(2) ** (power - mantissa))  # a Fraction rounds half to even, exactly
    # A normal number has 2^mantissa <= steps; that leading bit carries into the exponent field, which is why
    # subnormal numbers, normal numbers and a rounding up to the next power of two are one formula.
    return sign | min(((power - smallest) << mantissa) + steps, infinity)


def _floor_log2(exact: Fraction) -> int:
    power = exact.numerator.bit_length() - exact.denominator.bit_length()
    return power if exact >= Fraction(2) ** power else power - 1


def _widen(bits: ArrayLike, mantissa: int, exponent: int) -> Array:
    whole = np.asarray(bits).astype(np.int64)
    negative = (whole >> (mantissa + exponent)) & 1
    field = (whole >> mantissa) & (2**exponent - 1)
    fraction = whole & (2**mantissa - 1)
    bias = 2 ** (exponent - 1) - 1
    steps = np.where(field == 0, fraction, fraction + 2**mantissa)
    finite = np.ldexp(steps.astype(np.float64), np.maximum(field, 1) - bias - mantissa)
    special = np.where(fraction == 0, np.inf, np.nan)
    return np.where(negative == 1, -1.0, 1.0) * np.where(field == 2**exponent - 1, special, finite)


# Random numbers -----------------------------------------------------------------------------------------

PHILOX_MULTIPLIER = 0xD256D193  # M of Philox2x32
PHILOX_WEYL = 0x9E3779B9  # the golden ratio, by which the key is bumped between rounds


def philox2x32(counter: tuple[int, int], key: int, rounds: int = 10) -> tuple[int, int]:
    """Philox2x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).

    Each round maps (x0, x1) to (hi(M·x0) ^ key ^ x1, lo(M·x0)); the key grows by the Weyl constant in
    between.
    """
    x0, x1 = counter
    for _ in range(rounds):
        product = PHILOX_MULTIPLIER * x0
        x0, x1 = (product >> 32) ^ key ^ x1, product & 0xFFFFFFFF
        key = (key + PHILOX_WEYL) & 0xFFFFFFFF
    return x0, x1


PHILOX_VECTORS: tuple[tuple[tuple[int, int], int, tuple[int, int]], ...] = (
    # counter, key, result: the known-answer vectors that Random123 publishes for philox2x32-10
    ((0x00000000, 0x00000000), 0x00000000, (0xFF1DAE59, 0x6CD10DF2)),
    ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
)
