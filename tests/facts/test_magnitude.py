"""The cut is the exact k-th largest magnitude, however the counting was divided."""

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mergetool.facts.magnitude import cuts, kept, trivial
from mergetool.kernels import compile
from mergetool.kernels.arrays import NumpyArrays
from mergetool.kernels.backend import Layout
from mergetool.kernels.torch_arrays import TorchArrays


def counter(parts):
    """A counting pass written naively; ``parts`` are tiles or tensors, each with one delta for each source."""

    def count(within, prefix):
        counts = np.zeros((len(prefix), 1 << 16), np.int64)
        for deltas in parts:
            for i, delta in enumerate(deltas):
                for code in oracles.float32_magnitude(delta).view(np.uint32).tolist():
                    if not within:
                        counts[i, code >> 16] += 1
                    elif code >> 16 == prefix[i]:
                        counts[i, code & 0xFFFF] += 1
        return counts

    return count


def cut_of(delta, density):
    (found,) = cuts((density,), len(delta), counter([[delta]]))
    return found


def assert_keeps_the_largest(delta, density):
    """Rule (a) of the oracles, from both sides: nothing kept is smaller than anything dropped, and k are kept."""
    keeps = np.abs(delta) >= cut_of(delta, density)
    magnitude = oracles.float32_magnitude(delta)
    np.testing.assert_array_equal(keeps, magnitude >= oracles.cut(delta, density))
    assert keeps.sum() >= kept(density, len(delta))
    assert (magnitude > oracles.cut(delta, density)).sum() < kept(density, len(delta))


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


def test_density_one_keeps_all_and_zero_none_without_counting():
    def unwanted(within, prefix):
        raise AssertionError("nothing has to be counted")

    assert cuts((1.0, 0.0, 1.0), 100, unwanted) == (0.0, np.inf, 0.0)
    assert [trivial(d) for d in (0.0, 1e-9, 0.5, 1.0)] == [True, False, False, True]


def test_an_empty_tensor_is_not_counted():
    assert len(cuts((0.5, 1.0), 0, lambda *_: 1 / 0)) == 2


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
    whole = cuts(densities, n, counter([sources]))
    assert whole == tuple(cut_of(delta, q) for delta, q in zip(sources, densities, strict=True))
    for places in ([1], [1000, 2000, 3000], sorted(random.integers(0, n, 20))):
        pieces = [np.split(delta, places) for delta in sources]
        parts = list(zip(*pieces, strict=True))[::-1]
        assert cuts(densities, n, counter(parts)) == whole


@pytest.mark.parametrize("within", [False, True])
def test_every_binding_counts_the_same(within):
    """Also for a source whose prefix is that of no magnitude, because it is not looked at."""
    random = np.random.default_rng(6)
    n = 5000
    base = random.normal(size=n).astype(np.float32)
    sources = [(base + random.normal(size=n) * 1e-3).astype(np.float32), base.copy(), -base]
    prefix = np.array([int(np.float32(1e-3).view(np.uint32)) >> 16, 0, 0xFFFFFFFF], np.uint32)
    expected = counter([[source.astype(np.float64) - base for source in sources]])(within, prefix)
    for backend in (compile, NumpyArrays(), TorchArrays("cpu")):
        counts = np.zeros((3, 1 << 16), np.int64)
        backend.histogram(Layout(True, ("F32",) * 4), within)((base, *sources), counts, prefix)
        np.testing.assert_array_equal(counts, expected)
    assert expected.sum(axis=1).tolist() == ([expected[0].sum(), n, 0] if within else [n, n, n])
