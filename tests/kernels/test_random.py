"""Random numbers are a function of seed, source, tensor and coordinate; nothing else, in every binding."""

import numpy as np
import oracles
import pytest

from mergetool.kernels import compile, random
from mergetool.kernels.backend import Layout
from mergetool.kernels.torch_arrays import TorchArrays

N = 1 << 18


def lot(chance):
    return chance[0]


def compiled_draws(key, start, stop):
    kernel = compile.combine(lot, ("chance",), (), Layout(False, ("F64",), "F64"))
    out = np.empty(stop - start)
    kernel(start, (np.zeros(stop - start),), out, (np.uint64(key),))
    return out


def torch_draws(key, start, stop):
    return TorchArrays("cpu").draws(key, start, stop).numpy()


BINDINGS = {"compiled": compiled_draws, "numpy": random.draws, "torch": torch_draws}
bindings = pytest.mark.parametrize("draws", BINDINGS.values(), ids=BINDINGS)


@bindings
@pytest.mark.parametrize(("counter", "key", "result"), oracles.PHILOX_VECTORS)
def test_two_draws_are_the_two_words_of_philox(draws, counter, key, result):
    """The published known answers; the counter's upper word is reached through the upper half of the key."""
    low, high = counter
    found = draws((high << 32) | key, 2 * low, 2 * low + 2)
    assert found.tolist() == [result[0] / 2**32, result[1] / 2**32]


@bindings
@pytest.mark.parametrize("start", [0, 1, 65536 * 5, 2**32 - 3, 2**33 + 17, 2**45])
def test_half_the_coordinate_is_the_counter(draws, start):
    """Counters beyond 2**32 are crossed with the upper half of the key."""
    key = 0x0123456789ABCDEF
    found = draws(key, start, start + 6)
    for i, draw in enumerate(found):
        pair, which = divmod(start + i, 2)
        counter = (pair & 0xFFFFFFFF, (pair >> 32) ^ (key >> 32))
        assert draw == oracles.philox2x32(counter, key & 0xFFFFFFFF)[which] / 2**32


@pytest.mark.parametrize("key", [0, 1, 2**63, 2**64 - 1, random.key(1, "a", "b")])
@pytest.mark.parametrize("start", [0, 2**32 - 501, 2**33 - 500])
@pytest.mark.parametrize("count", [1, 1000, 2048, 2049, 4097])
def test_all_bindings_draw_the_same(key, start, count):
    expected = random.draws(key, start, start + count)
    np.testing.assert_array_equal(compiled_draws(key, start, start + count), expected)
    np.testing.assert_array_equal(torch_draws(key, start, start + count), expected)


@bindings
def test_draws_do_not_depend_on_where_a_tile_starts(draws):
    whole = draws(99, 0, 1000)
    np.testing.assert_array_equal(np.concatenate([draws(99, a, b) for a, b in [(0, 1), (1, 640), (640, 1000)]]), whole)


def test_a_key_depends_on_seed_source_and_tensor():
    keys = {
        random.key(seed, source, tensor)
        for seed in (0, 1, -1, 10)
        for source in ("a", "b", "ab", "", "0")
        for tensor in ("t", "u", "bt", "")
    }
    assert len(keys) == 4 * 5 * 4
    assert all(0 <= key < 2**64 for key in keys)


def test_a_key_is_the_same_for_ever():
    """A recipe with a seed gives the same model next year: changing this number breaks that promise."""
    assert random.key(42, "org/model", "model.layers.0.mlp.up_proj.weight") == 0xEB7DB7C68BAAD08A


def test_draws_are_uniform():
    """Five standard errors for mean and variance; six for the fullest and emptiest of 256 bins."""
    found = random.draws(random.key(0, "a", "t"), 0, N)
    assert found.min() >= 0.0
    assert found.max() < 1.0
    assert abs(found.mean() - 0.5) < 5 * np.sqrt(1 / 12 / N)
    assert abs(found.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / N)
    bins = np.bincount((found * 256).astype(int), minlength=256)
    assert np.abs(bins - N / 256).max() < 6 * np.sqrt(N / 256)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_a_mask_keeps_its_density(density):
    """Five standard errors of a binomial share."""
    kept = random.draws(random.key(0, "a", "t"), 0, N) < density
    assert abs(kept.mean() - density) < 5 * np.sqrt(density * (1 - density) / N)


def test_masks_are_independent():
    """Of other seeds, sources and tensors, and of their own neighbours: correlations within five standard errors."""
    one = random.draws(random.key(0, "a", "t"), 0, N)
    others = [random.draws(random.key(*key), 0, N) for key in [(1, "a", "t"), (0, "b", "t"), (0, "a", "u")]]
    pairs = [*((one, other) for other in others), (one[:-1], one[1:]), (one[:-64], one[64:])]
    for x, y in pairs:
        assert abs(np.corrcoef(x < 0.5, y < 0.5)[0, 1]) < 5 / np.sqrt(len(x))
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(len(x))
