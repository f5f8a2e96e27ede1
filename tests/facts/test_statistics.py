"""Statistics taken batch by batch are those of all rows at once, and can be saved half-way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from mergetool.facts import statistics as s


def rows(n, channels, seed=0, shift=3.0):
    random = np.random.default_rng(seed)
    values = random.normal(size=(n, channels)) * random.uniform(0.1, 5, channels) + shift
    return torch.from_numpy(values.astype(np.float32))


def in_batches(x, sizes=(1, 100, 0, 37)):
    return x.split([*sizes, len(x) - sum(sizes)])


@pytest.mark.parametrize("channels", [7, 600])  # less than a strip, and more
def test_gram_is_the_naive_one_in_float64(channels):
    x = rows(500, channels)
    state = s.empty_gram(channels)
    for batch in in_batches(x):
        s.accumulate_gram(state, batch)
    found = s.finish_gram(state)
    naive = x.numpy().astype(np.float64).T @ x.numpy().astype(np.float64)
    np.testing.assert_allclose(found["gram"].numpy(), naive, rtol=1e-5, atol=1e-5 * naive.max())
    assert found["gram"].dtype == torch.float32
    assert torch.equal(found["gram"], found["gram"].T)
    assert float(found["count"]) == 500


def test_a_state_can_be_saved_and_taken_up():
    x = rows(300, 20)
    whole, first = s.empty_gram(20), s.empty_gram(20)
    for batch in in_batches(x):
        s.accumulate_gram(whole, batch)
    for batch in in_batches(x)[:2]:
        s.accumulate_gram(first, batch)
    second = load(save(first))
    for batch in in_batches(x)[2:]:
        s.accumulate_gram(second, batch)
    assert all(torch.equal(whole[key], second[key]) for key in whole)


@pytest.mark.parametrize("shift", [0.0, 1e4])  # with a large mean, sums of squares would lose the deviation
def test_moments_are_the_naive_ones(shift):
    x = rows(500, 9, shift=shift)
    state = s.empty_moments(9)
    for batch in in_batches(x):
        s.accumulate_moments(state, batch)
    found = s.finish_moments(state)
    exact = x.numpy().astype(np.float64)
    np.testing.assert_allclose(found["mean"], exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["std"], exact.std(0), rtol=1e-6)
    assert float(found["count"]) == 500


def test_the_moments_of_nothing_are_zeros():
    assert not s.finish_moments(s.empty_moments(3))["std"].any()


def test_correlation_is_the_naive_one_and_signed():
    x, y = rows(400, 6), rows(400, 5, seed=1)
    y[:, 2] = -2 * x[:, 1] + 7
    state = s.empty_cross(6, 5)
    for a, b in zip(in_batches(x), in_batches(y), strict=True):
        s.accumulate_cross(state, a, b)
    found = s.finish_cross(state)["correlation"].numpy()
    naive = np.corrcoef(x.numpy().astype(np.float64).T, y.numpy().astype(np.float64).T)[:6, 6:]
    np.testing.assert_allclose(found, naive, atol=1e-5)
    assert found[1, 2] == pytest.approx(-1, abs=1e-5)


def test_a_constant_channel_correlates_with_nothing():
    x, y = rows(400, 3), rows(400, 3, seed=1)
    x[:, 1] = 0.1
    state = s.empty_cross(3, 3)
    for a, b in zip(in_batches(x), in_batches(y), strict=True):
        s.accumulate_cross(state, a, b)
    assert not s.finish_cross(state)["correlation"][1].any()


@pytest.mark.parametrize("channels", [6, 600])  # less than a strip, and more
def test_inner_products_are_the_naive_ones_uncentred(channels):
    x, y = rows(400, channels), rows(400, 5, seed=1)
    x[:, 1] = 0
    y[:, 2] = -2 * x[:, 3]
    state = s.empty_inner(channels, 5)
    for a, b in zip(in_batches(x), in_batches(y), strict=True):
        s.accumulate_inner(state, a, b)
    found = {name: value.numpy() for name, value in s.finish_inner(state).items()}
    exact = [each.numpy().astype(np.float64) for each in (x, y)]
    np.testing.assert_allclose(found["inner"], exact[0].T @ exact[1] / 400, rtol=1e-5, atol=1e-5)
    for i, each in enumerate(exact, 1):
        np.testing.assert_allclose(found[f"rms_{i}"], np.sqrt(np.square(each).mean(0)), rtol=1e-6)
    assert not found["inner"][1].any()
    assert found["rms_1"][1] == 0
    assert found["inner"][3, 2] == pytest.approx(-found["rms_1"][3] * found["rms_2"][2], rel=1e-5)
    assert float(found["count"]) == 400
    assert not any(value.any() for value in s.finish_inner(s.empty_inner(2, 3)).values())


@pytest.mark.parametrize("statistic", ["cross", "inner"])
def test_rows_of_other_tokens_are_refused(statistic):
    state = getattr(s, f"empty_{statistic}")(2, 2)
    with pytest.raises(ValueError, match="not the same tokens"):
        getattr(s, f"accumulate_{statistic}")(state, torch.ones(3, 2), torch.ones(4, 2))


def test_squared_gradients_and_sensitivities_are_means_over_samples():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    gradients = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[-1.0, 0.0], [1.0, 2.0]])]
    squared, each, total = s.empty_squared_gradients((2, 2)), s.empty_sensitivity((2, 2)), s.empty_sensitivity()
    for gradient in gradients:
        s.accumulate_squared_gradients(squared, gradient)
        s.accumulate_sensitivity(each, weight, gradient)
        s.accumulate_sensitivity(total, weight, gradient)
    np.testing.assert_allclose(s.finish_squared_gradients(squared)["squared_gradient"], [[1, 2], [5, 10]])
    np.testing.assert_allclose(s.finish_sensitivity(each)["sensitivity"], [[1, 2], [1, 0]])
    assert float(s.finish_sensitivity(total)["sensitivity"]) == 4


def test_every_statistic_makes_the_fields_it_names():
    for statistic in s.STATISTICS.values():
        shape = (3,) if statistic.side == "gradient" else 3
        assert tuple(statistic.finish(statistic.empty(shape))) == statistic.fields
