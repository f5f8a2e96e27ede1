"""Every method computes what its paper says: against oracles written naively in float64, rounded once."""

import numpy as np
import oracles
import pytest

from mergetool.kernels import random
from methods.cases import BACKENDS, ROUND, SOURCES, Case, every_variant, make, merge, sources_of, ulps, values_of
from methods.cases import BARE as METHODS

SIZE = 4000


def masks(case):
    """What each source keeps, drawn as recipes draw it: by seed, label, tensor and coordinate."""
    keys = [random.key(case.seed, f"source {i}", case.name) for i in range(len(case.parameters["density"]))]
    draws = [random.draws(key, 0, len(case.raw[0])) for key in keys]
    return [draw < q for draw, q in zip(draws, case.parameters["density"], strict=True)]


def _dare(consensus):
    def oracle(case, base, *sources):
        p = case.parameters
        return oracles.dare(
            base, sources, masks(case), p["weight"], p["density"], p["rescale"], consensus, p["normalize"], p["lambda"]
        )

    return oracle


def _ties(case, base, *sources):
    p = case.parameters
    return oracles.ties(base, sources, p["weight"], p["density"], p["lambda"], p["normalize"])


def _task_arithmetic(case, base, *sources):
    p = case.parameters
    return oracles.task_arithmetic(base, sources, p["weight"], p["lambda"], p["normalize"])


ORACLES = {
    "linear": lambda case, *x: oracles.linear(x, case.parameters["weight"], case.parameters["normalize"]),
    "slerp": lambda case, a, b: oracles.slerp(a, b, case.parameters["t"]),
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_linear": _dare(consensus=False),
    "dare_ties": _dare(consensus=True),
    "passthrough": lambda case, x: oracles.passthrough(x, case.parameters["scale"][0]),
}


def expected(case):
    return ORACLES[case.method.name](case, *case.wide)


EVERY = every_variant()
IDS = [f"{method.name}-{i}" for i, (method, _) in enumerate(EVERY)]
variants = pytest.mark.parametrize(("method", "parameters"), EVERY, ids=IDS)


def test_every_method_has_an_oracle():
    """A new method is listed in ORACLES, with the formula of its paper in tests/oracles.py."""
    assert set(ORACLES) == set(METHODS)


@variants
@pytest.mark.parametrize("distance", [1e-3, 1.0], ids=["near", "far"])
def test_float32_is_the_oracle_within_one_ulp(method, parameters, distance):
    """One, because the oracle adds in another order or divides where a kernel multiplies by a reciprocal.

    Such float64 results differ in their last bits, which may fall on two sides of a float32 midpoint.
    """
    case = make(method, parameters, SIZE, distance=distance)
    out, bad = merge(case)
    assert bad == 0
    assert ulps(out, expected(case).astype(np.float32)) <= 1


MIXED = ("BF16", "F32", "F16", "BF16")
"""A base in bfloat16, sources in float32, float16 and bfloat16; the first of them for methods without a base."""


@variants
@pytest.mark.parametrize(("dtypes", "output"), [(MIXED, "BF16"), (("F16",), "F16")], ids=["mixed-BF16", "F16"])
def test_16_bit_results_are_the_oracle_rounded_once(method, parameters, dtypes, output):
    """Bit for bit, also where the inputs have three dtypes.

    Either neighbour will do where the exact result is half-way between them, as few bits divided and multiplied by the
    same number are: then the last bit of a float64 decides.
    """
    case = make(method, parameters, SIZE, dtypes, output, seed=1)
    out, bad = merge(case)
    assert bad == 0
    exact = expected(case)
    last = np.abs(exact) * 2.0**-50
    below, nearest, above = (ROUND[output](exact + step) for step in (-last, 0.0, last))
    assert np.mean(out == nearest) > 0.999
    np.testing.assert_array_equal(np.where(out == above, above, np.where(out == below, below, nearest)), out)


@pytest.mark.parametrize("density", [0.0, 1e-6, 0.2, 1.0])
@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if "density" in m.parameters])
def test_any_density_is_the_oracle_s(name, density):
    method = METHODS[name]
    parameters = {n: p.default for n, p in method.parameters.items()}
    parameters |= {"weight": (0.2, 1.0, -0.4), "density": (density, 0.5, 1.0)}
    case = make(method, parameters, SIZE, seed=2)
    assert ulps(merge(case)[0], expected(case).astype(np.float32)) <= 1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [(0.5, -0.5, 0.0), (1.0, -1.0, 1e-9), (0.0, 0.0, 0.0), (-1.0, -2.0, -3.0)])
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_weights_that_sum_to_nothing_are_the_oracle_s(name, weight, normalize):
    """Not refused, as they are by `linear`: a delta may be added and another taken away."""
    method = METHODS[name]
    parameters = {n: (p.default,) * SOURCES if p.per_source else p.default for n, p in method.parameters.items()}
    parameters |= {"weight": weight, "normalize": normalize}
    case = make(method, parameters, SIZE, seed=3)
    assert ulps(merge(case)[0], expected(case).astype(np.float32)) <= 1


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("angle", [0.01, 0.0316, 0.0317, 1.5, 3.0, np.pi], ids=str)
def test_slerp_is_the_oracle_at_any_angle(angle, t):
    """Straight below 0.0316 = arccos 0.9995 and near π, on the arc between."""
    a, b = (v / np.linalg.norm(v) for v in np.linalg.qr(np.random.default_rng(4).normal(size=(SIZE, 2)))[0].T)
    ends = [2.0 * a, 0.5 * (np.cos(angle) * a + np.sin(angle) * b)]
    case = Case(METHODS["slerp"], {"t": t}, [v.astype(np.float32) for v in ends], ("F32", "F32"))
    assert ulps(merge(case)[0], expected(case).astype(np.float32)) <= 1


def test_slerp_of_vectors_without_direction_is_the_oracle_s():
    ends = [np.zeros(SIZE), values_of(METHODS["linear"], SIZE)[0]]
    for first, second in (ends, ends[::-1], [ends[0]] * 2, [ends[1] * 1e-12, ends[1]]):
        raw = [first.astype(np.float32), second.astype(np.float32)]
        case = Case(METHODS["slerp"], {"t": 0.3}, raw, ("F32", "F32"))
        assert ulps(merge(case)[0], expected(case).astype(np.float32)) <= 1


def test_ties_of_heavily_tied_deltas_is_the_oracle_s():
    """Deltas of a few magnitudes in powers of two: many ties at the cut, totals of exactly zero, all float64 exact."""
    method = METHODS["ties"]
    grid = np.random.default_rng(9).integers(-2, 3, (sources_of(method), SIZE)) * 2.0**-10
    raw = [np.ones(SIZE, np.float32), *(1.0 + grid).astype(np.float32)]
    parameters = {n: p.default for n, p in method.parameters.items()}
    for weight in ((1.0, 1.0, 1.0), (1.0, -0.5, 2.0)):
        case = Case(method, {**parameters, "weight": weight, "density": (0.1, 0.5, 0.9)}, raw, ("F32",) * len(raw))
        assert ulps(merge(case)[0], expected(case).astype(np.float32)) <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_keeps_what_lies_exactly_at_the_cut(backend):
    """A float64 delta half way between two float32 numbers, which is the cut itself; ties go to even."""
    method = METHODS["ties"]
    values = np.array([1.0 - 2.0**-25, 1.0 - 2.0**-24, 0.5, 0.0])
    parameters = {n: p.default for n, p in method.parameters.items()} | {"weight": (1.0,), "density": (0.25,)}
    case = Case(method, parameters, [np.zeros(4), values], ("F64", "F64"), "F64")
    out, _ = merge(case, backend)
    np.testing.assert_array_equal(out, [values[0], 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(out, expected(case))
