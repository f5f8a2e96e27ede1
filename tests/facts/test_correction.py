"""Factors of REPAIR and TACT equal the papers' equations unit by unit, and folding them changes nothing else."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetool.errors import NonFinite, RunError
from mergetool.facts.correction import (
    Edit,
    Factors,
    Moments,
    batch_norm,
    factors,
    fold,
    fold_into_reader,
    goal,
    spread_ratio,
)


def moments(values):
    """Of activations [samples, units]."""
    return Moments(values.mean(0), values.std(0), len(values))


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def naive_goal(sources, weights):
    units = len(sources[0].mean)
    mean, std = [0.0] * units, [0.0] * units
    for a, source in zip(weights, sources, strict=True):
        for c in range(units):
            mean[c] += a * source.mean[c]
            std[c] += a * source.std[c]
    return mean, std


def naive_factors(target, merged, epsilon, clamp, shifted):
    """The equations, one unit after the other; no unit is dead."""
    result = []
    for c in range(len(target.mean)):
        scale = (target.std[c] + epsilon) / (merged.std[c] + epsilon)
        scale = max(1 / clamp, min(clamp, scale))
        result.append((scale, target.mean[c] - scale * merged.mean[c] if shifted else 0.0))
    return result


def test_the_goal_of_repair_averages_standard_deviations_not_variances():
    sources = [moments(numbers(seed, 50, 6) * (seed + 1)) for seed in range(3)]
    weights = (0.5, 0.3, 0.2)

    found = goal(sources, weights)

    mean, std = naive_goal(sources, weights)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(found.std, std, rtol=1e-14)
    assert not np.allclose(found.std, np.sqrt(sum(a * s.std**2 for a, s in zip(weights, sources, strict=True))))


def test_the_goal_takes_equal_shares_where_none_are_given():
    sources = [moments(numbers(seed, 50, 6)) for seed in range(4)]
    equal, stated = goal(sources), goal(sources, [0.25] * 4)
    np.testing.assert_array_equal(equal.mean, stated.mean)
    np.testing.assert_array_equal(equal.std, stated.std)
    assert equal.count == 50


def test_the_goal_of_one_source_is_the_source():
    (only,) = sources = [moments(numbers(0, 20, 3))]
    assert np.array_equal(goal(sources).mean, only.mean)
    assert np.array_equal(goal(sources).std, only.std)


def test_a_goal_needs_sources_and_a_weight_for_each():
    with pytest.raises(ValueError, match="no sources"):
        goal([])
    with pytest.raises(ValueError, match="zip"):
        goal([moments(numbers(0, 5, 2))], [0.5, 0.5])


@given(
    seed=st.integers(0, 10_000),
    units=st.integers(1, 8),
    clamp=st.sampled_from([1.0, 1.5, 10.0, 1e9]),
    samples=st.sampled_from([None, 0, 1, 16, 10_000]),
    statistic=st.sampled_from(["mean_std", "std"]),
)
def test_factors_equal_the_equations(seed, units, clamp, samples, statistic):
    target, merged = moments(numbers(seed, 30, units) * 3 + 1), moments(numbers(seed + 1, 30, units))
    epsilon = 0.0 if samples is None else sum(target.std) / units / (2 * max(samples, 1))

    found = factors(target, merged, statistic=statistic, clamp=clamp, samples=samples)

    expected = naive_factors(target, merged, epsilon, clamp, statistic == "mean_std")
    np.testing.assert_allclose(found.scale, [scale for scale, _ in expected], rtol=1e-13)
    np.testing.assert_allclose(found.shift, [shift for _, shift in expected], rtol=1e-12, atol=1e-14)


@given(seed=st.integers(0, 10_000), units=st.integers(1, 8))
def test_corrected_activations_have_the_mean_and_spread_of_the_goal(seed, units):
    target, z = moments(numbers(seed, 40, units) * 2 - 1), numbers(seed + 1, 40, units)
    found = factors(target, moments(z), clamp=1e9)

    corrected = moments(z * found.scale + found.shift)

    np.testing.assert_allclose(corrected.mean, target.mean, atol=1e-12)
    np.testing.assert_allclose(corrected.std, target.std, rtol=1e-12)


def test_scale_alone_corrects_the_spread_and_needs_no_bias():
    target, z = moments(numbers(0, 40, 5) * 2 - 1), numbers(1, 40, 5) + 3
    found = factors(target, moments(z), statistic="std")
    assert not found.shift.any()
    np.testing.assert_allclose(moments(z * found.scale).std, target.std, rtol=1e-12)


def test_nothing_to_correct_corrects_nothing():
    same = moments(numbers(0, 40, 5))
    found = factors(same, same, samples=3)
    np.testing.assert_array_equal(found.scale, 1.0)
    np.testing.assert_array_equal(found.shift, 0.0)


@pytest.mark.parametrize("dead", [0.0, 1e-12, 1e-8])
def test_a_unit_that_is_dead_in_the_merged_model_keeps_its_scale_and_gets_the_mean(dead):
    target = Moments(np.array([2.0]), np.array([1.0]))
    found = factors(target, Moments(np.array([0.5]), np.array([dead])), samples=4)
    assert found.scale == 1.0
    assert found.shift == 1.5


def test_a_unit_that_is_constant_but_for_rounding_is_dead():
    """A large constant summed in float32 seems to spread a little; so may the target's."""
    constant = Moments(np.array([1000.0]), np.array([1e-5]))
    found = factors(Moments(np.array([1000.0]), np.array([3e-5])), constant)
    assert (found.scale, found.shift) == (1.0, 0.0)


def test_a_unit_that_is_dead_in_the_target_is_scaled_down_to_the_clamp():
    found = factors(Moments(np.array([3.0]), np.array([0.0])), Moments(np.array([1.0]), np.array([2.0])), clamp=8.0)
    assert (found.scale, found.shift) == (1 / 8, 3 - 1 / 8)


def test_units_dead_in_both_are_left_with_the_targets_mean():
    zero = np.zeros(3)
    found = factors(Moments(np.array([0.0, 1.0, -1.0]), zero), Moments(zero, zero), samples=2)
    np.testing.assert_array_equal(found.scale, 1.0)
    np.testing.assert_array_equal(found.shift, [0.0, 1.0, -1.0])


def test_the_clamp_holds_in_both_directions():
    target, merged = Moments(np.zeros(3), np.array([100.0, 1.0, 0.01])), Moments(np.ones(3), np.ones(3))
    found = factors(target, merged, clamp=10.0)
    np.testing.assert_allclose(found.scale, [10.0, 1.0, 0.1])
    np.testing.assert_allclose(found.shift, [-10.0, -1.0, -0.1])


@given(seed=st.integers(0, 1000))
def test_fewer_samples_draw_every_scale_closer_to_one(seed):
    target, merged = moments(numbers(seed, 30, 6) * 3), moments(numbers(seed + 1, 30, 6))
    distances = [
        np.abs(np.log(factors(target, merged, samples=samples, clamp=1e9).scale)) for samples in (1, 4, 64, 10**9)
    ]
    distances.append(np.abs(np.log(factors(target, merged, clamp=1e9).scale)))
    for fewer, more in pairwise(distances):
        assert (fewer <= more + 1e-15).all()
    np.testing.assert_allclose(distances[-2], distances[-1], atol=1e-8)


def test_factors_do_not_depend_on_the_order_of_units():
    target, merged = moments(numbers(0, 30, 6) * 3), moments(numbers(1, 30, 6))
    order = np.random.default_rng(2).permutation(6)
    turned = factors(
        Moments(target.mean[order], target.std[order]), Moments(merged.mean[order], merged.std[order]), samples=10**6
    )
    np.testing.assert_allclose(turned.scale, factors(target, merged, samples=10**6).scale[order], rtol=1e-14)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_without_finite_moments_are_refused(value):
    fine = Moments(np.zeros(3), np.ones(3))
    broken = Moments(np.zeros(3), np.array([1.0, value, 1.0]))
    with pytest.raises(NonFinite, match=r"goal's activations .* in 1 units, 1 the first"):
        factors(broken, fine)
    with pytest.raises(NonFinite, match="merged model's activations"):
        factors(fine, broken)


def test_moments_of_different_models_are_refused():
    with pytest.raises(RunError, match="differ in their units"):
        factors(Moments(np.zeros(3), np.ones(3)), Moments(np.zeros(4), np.ones(4)))


def test_a_clamp_below_one_is_refused():
    one = Moments(np.zeros(1), np.ones(1))
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        factors(one, one, clamp=0.5)


# ---------------------------------------------------------------------------------------------------- folding


def correction(seed, units):
    return Factors(np.exp(numbers(seed, units)), numbers(seed + 1, units))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("biased", [True, False])
def test_a_folded_linear_gives_the_corrected_outputs(axis, biased):
    weight, bias, x, change = numbers(0, 5, 7), numbers(1, 5) if biased else None, numbers(2, 20, 7), correction(3, 5)
    z = x @ weight.T + (bias if biased else 0)

    folded, new_bias = fold(weight if axis == 0 else weight.T, bias, change, axis)

    found = x @ (folded.T if axis == 0 else folded) + new_bias
    np.testing.assert_allclose(found, z * change.scale + change.shift, rtol=1e-12, atol=1e-12)


def test_a_folded_convolution_gives_the_corrected_outputs():
    import torch
    from torch.nn.functional import conv2d

    weight, bias, x, change = numbers(0, 4, 3, 3, 3), numbers(1, 4), numbers(2, 2, 3, 6, 6), correction(3, 4)
    folded, new_bias = fold(weight, bias, change)
    before, after = (
        conv2d(*map(torch.from_numpy, (x, w, b)), padding=1).numpy() for w, b in ((weight, bias), (folded, new_bias))
    )
    expected = before * change.scale[:, None, None] + change.shift[:, None, None]
    np.testing.assert_allclose(after, expected, rtol=1e-12, atol=1e-12)


def test_a_norm_is_folded_like_a_layer_of_one_input_a_unit():
    gain, bias, x, change = numbers(0, 6), numbers(1, 6), numbers(2, 20, 6), correction(3, 6)
    folded, new_bias = fold(gain, bias, change)
    expected = (x * gain + bias) * change.scale + change.shift
    np.testing.assert_allclose(x * folded + new_bias, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("biased", [True, False])
def test_a_head_folded_with_what_it_reads_gives_what_it_gives_for_the_corrected(axis, biased):
    weight, bias, z, change = numbers(0, 5, 7), numbers(1, 5) if biased else None, numbers(2, 20, 7), correction(3, 7)
    expected = (z * change.scale + change.shift) @ weight.T + (bias if biased else 0)

    folded, new_bias = fold_into_reader(weight if axis == 1 else weight.T, bias, change, axis)

    found = z @ (folded.T if axis == 1 else folded) + new_bias
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_folding_computes_in_float64_and_leaves_its_inputs_alone():
    weight, bias = numbers(0, 3, 3).astype(np.float32), numbers(1, 3).astype(np.float32)
    copies = weight.copy(), bias.copy()
    folded, new_bias = fold(weight, bias, correction(2, 3))
    assert folded.dtype == new_bias.dtype == np.float64
    assert np.array_equal(weight, copies[0])
    assert np.array_equal(bias, copies[1])


def test_an_edit_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"axis 1 of a tensor of shape \(3, 4\) has no 3 units"):
        Edit(1, np.ones(3), None)(np.zeros((3, 4)))


def test_an_edit_may_leave_out_either_half():
    tensor = numbers(0, 2, 3)
    np.testing.assert_array_equal(Edit(0, None, None)(tensor), tensor)
    np.testing.assert_array_equal(Edit(1, None, np.arange(3.0))(tensor), tensor + np.arange(3.0))


# ------------------------------------------------------------------------------------------- batch norm, ratio


def test_fresh_statistics_equal_those_of_a_batch_norm_in_training():
    import torch

    x = numbers(0, 8, 3, 5, 5) * 2 + 1
    norm = torch.nn.BatchNorm2d(3, momentum=None, dtype=torch.float64)
    norm(torch.from_numpy(x))
    values = x.transpose(0, 2, 3, 1).reshape(-1, 3)

    mean, variance = batch_norm(moments(values))

    np.testing.assert_allclose(mean, norm.running_mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(variance, norm.running_var.numpy(), rtol=1e-12)


def test_fresh_statistics_of_unknown_count_are_the_populations():
    mean, variance = batch_norm(Moments(np.array([1.0]), np.array([3.0])))
    assert (mean, variance) == (1.0, 9.0)


def test_the_spread_ratio_skips_units_that_never_move():
    target = Moments(np.zeros(3), np.array([1.0, 2.0, 0.0]))
    assert spread_ratio(target, Moments(np.zeros(3), np.array([0.5, 0.5, 7.0]))) == (0.5 + 0.25) / 2
    assert spread_ratio(Moments(np.zeros(1), np.zeros(1)), Moments(np.zeros(1), np.ones(1))) == 1.0


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    axis=st.integers(0, 2),
    seed=st.integers(0, 100),
    cuts=st.lists(st.floats(0, 1), max_size=3),
)
def test_a_tensor_is_edited_in_runs_to_the_same_bits(shape, axis, seed, cuts):
    axis = axis % len(shape)
    tensor = numbers(seed, *shape)
    edit = Edit(axis, numbers(seed + 1, shape[axis]), numbers(seed + 2, shape[axis]) if seed % 2 else None)
    flat = tensor.reshape(-1).copy()
    places = sorted({0, flat.size, *(int(cut * flat.size) for cut in cuts)})
    for start, stop in pairwise(places):
        edit.tile(flat[start:stop], shape, start)
    assert np.array_equal(flat, edit(tensor).reshape(-1))
