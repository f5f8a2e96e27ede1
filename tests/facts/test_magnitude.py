"""The cut is the exact k-th largest magnitude, however the counting was divided."""

import numpy as np
import oracles
import pytest
from backends import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mergetool.facts import magnitude
from mergetool.facts.magnitude import cuts, kept, trivial
from mergetool.kernels import rounding
from mergetool.kernels.backend import FEW_THRESHOLDS, THRESHOLDS, Layout


class Naive:
    """A look at the magnitudes written naively; ``parts`` are tiles or tensors, each with one delta for each source."""

    def __init__(self, parts, misleading=None):
        columns = zip(*parts, strict=True)
        self.bits = [oracles.float32_magnitude(np.concatenate(column)).view(np.uint32) for column in columns]
        self.misleading = misleading
        self.passes = self.most_gathered = 0

    def sample(self, share):
        if self.misleading is not None:
            return [self.misleading.copy() for _ in self.bits]
        return [bits[: int(np.ceil(len(bits) * share))] for bits in self.bits]

    def above(self, thresholds):
        self.passes += 1
        return np.array([[(bits >= t).sum() for t in row] for bits, row in zip(self.bits, thresholds, strict=True)])

    def between(self, low, high):
        self.passes += 1
        found = [bits[(bits >= a) & (bits < b)] for bits, a, b in zip(self.bits, low, high, strict=True)]
        self.most_gathered = max([self.most_gathered, *map(len, found)])
        return found


@pytest.fixture(autouse=True, params=["whole sample", "small sample", "tiny sample, nothing gathered"])
def search(request, monkeypatch):
    """The ways the search can go; tensors of a test are small, so its constants are made smaller still."""
    if request.param != "whole sample":
        monkeypatch.setattr(magnitude, "SAMPLE", 200)
        monkeypatch.setattr(magnitude, "CHEAP_GATHER", 100)
    if request.param == "tiny sample, nothing gathered":
        monkeypatch.setattr(magnitude, "SAMPLE", 5)
        monkeypatch.setattr(magnitude, "CHEAP_GATHER", 0)
        monkeypatch.setattr(magnitude, "LARGEST_GATHER", 0)


def cut_of(delta, density):
    look = Naive([[delta]])
    (found,) = cuts((density,), len(delta), look)
    assert look.most_gathered <= magnitude.LARGEST_GATHER
    return found


def assert_keeps_the_largest(delta, density):
    """Rule (a) of the oracles, from both sides: nothing kept is smaller than anything dropped, and k are kept."""
    keeps = np.abs(delta) >= cut_of(delta, density)
    sizes = oracles.float32_magnitude(delta)
    np.testing.assert_array_equal(keeps, sizes >= oracles.cut(delta, density))
    assert keeps.sum() >= kept(density, len(delta))
    assert (sizes > oracles.cut(delta, density)).sum() < kept(density, len(delta))


def deltas():
    random = np.random.default_rng(11)
    n = 3000
    normal = random.normal(size=n) * 1e-3
    return {
        "random": normal,
        "heavily tied": random.integers(-3, 4, n) * 0.125,
        "mostly zero": np.where(random.random(n) < 0.7, 0.0, normal),
        "all equal": np.full(n, -0.001),
        "all zero": np.zeros(n),
        "both zeros": random.choice([0.0, -0.0], n),
        "one": np.array([0.3]),
        "two": np.array([0.3, -0.4]),
        "float32": normal.astype(np.float32).astype(np.float64),
        "tied only in float32": 0.1 + random.integers(-5, 6, n) * 1e-12,
        "subnormal in float32": normal * 1e-40,
        "zero in float32": random.normal(size=n) * 1e-60,
        "neighbours": np.nextafter(np.float32(1), np.float32(2)) - random.integers(0, 2, n) * 2.0**-23,
    }


@pytest.mark.parametrize("density", [1e-12, 1e-3, 0.2, 0.3, 0.5, 0.9, 1 - 1e-12])
@pytest.mark.parametrize("delta", deltas().values(), ids=deltas())
def test_the_cut_keeps_the_k_largest_and_what_is_tied_with_them(delta, density):
    assert_keeps_the_largest(delta, density)


@given(
    arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e38, 1e38, width=64)),
    st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
)
def test_the_cut_is_exact_for_any_delta_and_density(delta, density):
    assert_keeps_the_largest(delta, density)


def test_a_cut_may_be_compared_in_float64():
    """It is the smallest float64 that float32 rounds up to the k-th magnitude: neighbours on both sides say so."""
    for value in (0.1, 1.0, np.float32(1) + np.float32(2.0**-23), 3e-42, 2.0**-149, 3.4028234663852886e38):
        cut = cut_of(np.array([value, 0.0]), 0.5)
        assert np.float32(cut) == np.float32(value)
        assert np.float32(np.nextafter(cut, 0.0)) < np.float32(value)


def test_a_delta_too_large_for_float32_is_kept():
    """A float64 source may differ by more than float32 holds; that is its largest entry all the same."""
    delta = np.array([1e39, -1e300, 1.0, 0.0])
    np.testing.assert_array_equal(np.abs(delta) >= cut_of(delta, 0.5), [True, True, False, False])


def test_density_one_keeps_all_and_zero_none_without_looking():
    assert cuts((1.0, 0.0, 1.0), 100, None) == (0.0, np.inf, 0.0)
    assert [trivial(d) for d in (0.0, 1e-9, 0.5, 1.0)] == [True, False, False, True]


def test_an_empty_tensor_is_not_looked_at():
    assert len(cuts((0.5, 1.0), 0, None)) == 2


@pytest.mark.parametrize(
    "misled", [np.zeros(50, np.uint32), np.full(50, 0x7F000000, np.uint32), np.arange(50, dtype=np.uint32)]
)
def test_a_misleading_sample_only_costs_passes(misled, monkeypatch):
    monkeypatch.setattr(magnitude, "SAMPLE", 50)
    delta = np.random.default_rng(2).normal(size=3000)
    look = Naive([[delta]], misled)
    assert cuts((0.3,), len(delta), look)[0] == pytest.approx(oracles.cut(delta, 0.3), rel=1e-6)
    assert (
        (np.abs(delta) >= cuts((0.3,), len(delta), look)[0])
        == (oracles.float32_magnitude(delta) >= oracles.cut(delta, 0.3))
    ).all()
    assert look.passes <= 2 * 12


def test_a_good_sample_takes_few_passes_over_a_large_tensor(monkeypatch):
    monkeypatch.setattr(magnitude, "SAMPLE", 1 << 12)
    monkeypatch.setattr(magnitude, "LARGEST_GATHER", 1 << 12)
    monkeypatch.setattr(magnitude, "CHEAP_GATHER", 1 << 8)
    delta = np.random.default_rng(3).normal(size=1 << 18)
    look = Naive([[delta]])
    cuts((0.2,), len(delta), look)
    assert look.passes <= 3


def test_at_least_one_entry_is_kept():
    assert kept(1e-9, 10) == 1
    assert kept(0.5, 0) == 1
    assert kept(0.3, 10) == 3
    assert kept(0.999, 10) == 9


def test_how_the_work_is_divided_does_not_matter():
    """Into tiles of one tensor, or tensors of a model of any sizes; sources have cuts of their own."""
    random = np.random.default_rng(5)
    n = 4000
    sources = [random.normal(size=n), np.round(random.normal(size=n), 1), np.zeros(n)]
    densities = (0.1, 0.37, 0.5)
    whole = cuts(densities, n, Naive([sources]))
    assert whole == tuple(cut_of(delta, q) for delta, q in zip(sources, densities, strict=True))
    for places in ([1], [1000, 2000, 3000], sorted(random.integers(0, n, 20))):
        pieces = [np.split(delta, places) for delta in sources]
        parts = list(zip(*pieces, strict=True))[::-1]
        assert cuts(densities, n, Naive(parts)) == whole


@pytest.mark.parametrize("dtypes", [("F32",) * 4, ("BF16",) * 4, ("F16", "BF16", "F32", "F64"), ("F64",) * 4])
def test_every_binding_looks_the_same(dtypes):
    random = np.random.default_rng(6)
    n = 5000
    base = random.normal(size=n)
    wide = [base, base + random.normal(size=n) * 1e-3, base.copy(), -base * 1e20]
    raw = tuple(rounding.narrow(x, dtype) for x, dtype in zip(wide, dtypes, strict=True))
    with np.errstate(invalid="ignore", over="ignore"):
        exact = [rounding.widen(x, dtype) for x, dtype in zip(raw, dtypes, strict=True)]
        naive = Naive([[value - exact[0] for value in exact[1:]]])
    low = np.array([int(np.float32(x).view(np.uint32)) for x in (1e-3, 0.0, 1.0)], np.uint32)
    high = np.array([int(np.float32(x).view(np.uint32)) for x in (2e-3, 1e-9, np.inf)], np.uint32)
    for backend in BACKENDS.values():
        for count in (THRESHOLDS, FEW_THRESHOLDS):
            thresholds = np.linspace(low, high + 1, count, axis=1).astype(np.uint32)
            counts = np.ones((3, count), np.int64)
            backend.above(Layout(True, dtypes), count)(raw, thresholds, counts)
            np.testing.assert_array_equal(counts, 1 + naive.above(thresholds))
        found, used = np.zeros((3, n), np.uint32), np.zeros(3, np.int64)
        backend.between(Layout(True, dtypes))(raw, low, high, found, used)
        for i, expected in enumerate(naive.between(low, high)):
            np.testing.assert_array_equal(np.sort(found[i, : used[i]]), np.sort(expected))


def test_what_finds_no_room_is_left_out():
    raw = (np.zeros(100, np.float32), np.arange(100, dtype=np.float32))
    for backend in BACKENDS.values():
        found, used = np.zeros((1, 10), np.uint32), np.array([4])
        everything = np.zeros(1, np.uint32), np.full(1, 0xFFFFFFFF, np.uint32)
        backend.between(Layout(True, ("F32", "F32")))(raw, *everything, found, used)
        assert used.tolist() == [10]
        kept = found[0].view(np.float32)
        assert kept[:4].tolist() == [0] * 4
        assert set(kept[4:]) <= set(raw[1])
        assert len(set(kept[4:])) == 6
