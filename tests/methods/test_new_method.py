"""One declaration is a whole method: compiled, in NumPy and in torch, streamed and in memory."""

import math
from typing import Annotated, Any

import numpy as np
import pytest

from mergetool.kernels.backend import BLOCK
from mergetool.kernels.language import maximum, sign, sqrt, where
from mergetool.methods.bare import merge_tensors
from mergetool.methods.declare import REQUIRED, Doc, Fraction, PerSource, Sums, method
from methods.cases import BACKENDS, Case, bits, merge, ulps

SMALLEST = 1e-6


def magnitude(x):
    return maximum(abs(x), SMALLEST)


def squares(delta: Any) -> Any:
    return tuple(delta[i] * delta[i] for i in range(len(delta)))


def norms(sums: Any, **rest: Any) -> tuple[float, ...]:
    return tuple(1.0 / math.sqrt(s) if s > 0.0 else 0.0 for s in sums)


@method(title="Geometric", paper="", citation="", base="required", measures={"factor": Sums(squares, norms)})
def geometric(
    base: Any,
    delta: Any,
    chance: Any,
    factor: Any,
    *,
    weight: Annotated[PerSource[float], Doc("The factor of each source.")] = REQUIRED,
    keep: Annotated[Fraction, Doc("The share that is kept.")] = 0.75,
    signed: Annotated[bool, Doc("Whether deltas keep their signs.")] = True,
) -> Any:
    """Add the square roots of the deltas, each made as long as the others, where chance will have it."""
    roots = tuple(where(signed, sign(delta[i]), 1.0) * sqrt(magnitude(delta[i])) for i in range(len(delta)))
    total = 0.0
    for i in range(len(delta)):
        total += where(chance[i] < keep, weight[i] * factor[i] * roots[i], 0.0)
    return base + total


PARAMETERS = {"weight": (0.5, -0.25), "keep": 0.6, "signed": True}


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(12)
    base = random.normal(size=BLOCK + 500).astype(np.float32)
    sources = [(base + random.normal(scale=0.1, size=base.shape) * (random.random(base.shape) < 0.8)) for _ in range(2)]
    return Case(geometric, PARAMETERS, [base, *(s.astype(np.float32) for s in sources)], ("F32",) * 3)


def test_a_new_method_is_the_same_in_every_binding(case):
    """One ulp, because its measure is a sum over the tensor."""
    expected, bad = merge(case)
    assert bad == 0
    for name in BACKENDS:
        assert ulps(merge(case, name)[0], expected) <= 1


def test_a_new_method_does_not_depend_on_tiles(case):
    for name in BACKENDS:
        whole, _ = merge(case, name)
        np.testing.assert_array_equal(bits(merge(case, name, tile=BLOCK)[0]), bits(whole))


def test_a_new_method_computes_what_it_says(case):
    from mergetool.kernels import random

    base, *sources = case.wide
    expected = base.copy()
    for i, (source, weight) in enumerate(zip(sources, PARAMETERS["weight"], strict=True)):
        delta = source - base
        kept = random.draws(random.key(case.seed, f"source {i}", case.name), 0, len(base)) < 0.6
        root = np.sign(delta) * np.sqrt(np.maximum(np.abs(delta), 1e-6))
        expected += kept * weight * root / np.sqrt(np.sum(delta**2))
    assert ulps(merge(case)[0], expected.astype(np.float32)) <= 1


def test_a_new_method_merges_bare_tensors(case):
    labels = ["source 0", "source 1"]
    base, *sources = case.raw
    merged = merge_tensors(
        geometric, sources, base, seed=case.seed, name=case.name, sources=labels, parameters=PARAMETERS
    )
    np.testing.assert_array_equal(merged, merge(case)[0])
