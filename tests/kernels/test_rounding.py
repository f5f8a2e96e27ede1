"""Every dtype is widened exactly and narrowed from float64 with one rounding, the same in every binding."""

import numpy as np
import oracles
import pytest
import torch
from backends import BACKENDS

from mergetool.kernels.backend import Layout
from mergetool.kernels.rounding import OVERFLOW

STORAGE = {"F64": np.float64, "F32": np.float32, "BF16": np.uint16, "F16": np.uint16}
ROUND = {
    "F32": oracles.round_to_float32,
    "BF16": oracles.round_to_bfloat16,
    "F16": oracles.round_to_float16,
}
QUIET = {"BF16": 0x7FC0, "F16": 0x7E00}

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def same(value):
    return value[0]


def convert(backend, raw, source, target):
    """The raw values of one dtype as another, and the number that is not finite."""
    kernel = backend.combine(same, ("value",), (), Layout(False, (source,), target))
    out = np.empty(raw.shape, STORAGE[target])
    bad = kernel(0, (raw,), out, (np.uint64(0),))
    return out, bad


def bits(array):
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.itemsize])


def assert_same_numbers(actual, expected):
    """Bit for bit, but that one NaN is as good as another."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    there = ~np.isnan(expected)
    np.testing.assert_array_equal(bits(actual)[there], bits(expected)[there])


def float8_values(name):
    codes = torch.arange(256, dtype=torch.uint8)
    return codes.view({"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[name]).double().numpy()


@backends
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("BF16", oracles.widen_bfloat16(np.arange(1 << 16))),
        ("F16", oracles.widen_float16(np.arange(1 << 16))),
        ("F8_E4M3", float8_values("F8_E4M3")),
        ("F8_E5M2", float8_values("F8_E5M2")),
    ],
    ids=["BF16", "F16", "F8_E4M3", "F8_E5M2"],
)
def test_every_pattern_of_a_narrow_dtype_widens_to_its_value(backend, dtype, expected):
    codes = np.arange(len(expected)).astype(np.uint16 if len(expected) > 256 else np.uint8)
    wide, bad = convert(backend, codes, dtype, "F64")
    assert_same_numbers(wide, expected)
    assert bad == np.count_nonzero(~np.isfinite(expected))


def difficult(dtype):
    """Numbers of the dtype, the midpoints between neighbours, and the float64 numbers next to all of those."""
    random = np.random.default_rng(7)
    if dtype == "F32":
        codes = random.integers(0, 0x7F800000, 8000).astype(np.uint32)
        codes = np.concatenate([codes, np.arange(200, dtype=np.uint32), np.uint32(0x00800000) + np.arange(-50, 50)])
        here, after = (c.astype(np.uint32).view(np.float32).astype(np.float64) for c in (codes, codes + 1))
    else:
        top, widen = {"BF16": (0x7F80, oracles.widen_bfloat16), "F16": (0x7C00, oracles.widen_float16)}[dtype]
        here, after = widen(np.arange(top)), widen(np.arange(1, top + 1))
    finite = np.isfinite(after)
    middle = (here[finite] + after[finite]) / 2
    edge = OVERFLOW[dtype]
    extremes = [0.0, 5e-324, 1e-320, 1e-46, 1e-45, 1e300, np.inf, np.nan, edge, np.nextafter(edge, 0), edge * 1.01]
    with np.errstate(invalid="ignore", over="ignore"):
        anything = random.integers(0, 1 << 64, 5000, dtype=np.uint64).view(np.float64)
        scattered = random.normal(size=5000) * 2.0 ** random.integers(-150, 130, 5000)
    exact = np.concatenate([middle, here[:: max(1, len(here) // 4000)]])
    values = np.concatenate([exact, np.nextafter(exact, 0), np.nextafter(exact, np.inf), scattered, extremes])
    return np.concatenate([values * random.choice([-1.0, 1.0], len(values)), [0.0, -0.0], anything])


@pytest.fixture(scope="module", params=["F32", "BF16", "F16"])
def rounded(request):
    """A dtype, numbers that are hard to round to it, and their bits by the oracle."""
    values = difficult(request.param)
    return request.param, values, ROUND[request.param](values)


@backends
def test_narrowing_rounds_once_to_nearest_even(backend, rounded):
    dtype, values, expected = rounded
    narrow, bad = convert(backend, values, "F64", dtype)
    there = ~np.isnan(values)
    np.testing.assert_array_equal(bits(narrow)[there], expected[there])
    infinity = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]
    assert bad == np.count_nonzero((expected & infinity) == infinity), "what rounds to infinity is counted too"


@backends
@pytest.mark.parametrize("dtype", QUIET)
def test_every_nan_becomes_the_one_quiet_nan_of_a_16_bit_dtype(backend, dtype):
    payloads = np.array([0x7FF8000000000000, 0xFFF8000000000000, 0x7FFFFFFFFFFFFFFF, 0xFFF8000000000001], np.uint64)
    narrow, bad = convert(backend, np.tile(payloads, 40).view(np.float64), "F64", dtype)
    assert set(narrow.tolist()) == {QUIET[dtype]}
    assert bad == 160


@backends
def test_a_nan_stays_a_nan_in_float32(backend):
    narrow, bad = convert(backend, np.array([np.nan, -np.nan, 1.0]), "F64", "F32")
    assert np.isnan(narrow).tolist() == [True, True, False]
    assert bad == 2


@backends
@pytest.mark.parametrize(("dtype", "kind"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_float32_is_narrowed_as_torch_narrows_it(backend, dtype, kind):
    values = np.random.default_rng(3).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    narrow, _ = convert(backend, values, "F32", dtype)
    expected = torch.from_numpy(values).to(kind).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(narrow, expected)


def test_rounding_through_float32_would_be_wrong():
    """The test above would not see it: just above a midpoint of bfloat16, by less than half a float32 ulp."""
    value = np.array([1.0 + 2.0**-8 + 2.0**-40])
    twice = oracles.round_to_bfloat16(value.astype(np.float32))
    assert oracles.round_to_bfloat16(value) == twice + 1
    for backend in BACKENDS.values():
        assert convert(backend, value, "F64", "BF16")[0] == twice + 1
