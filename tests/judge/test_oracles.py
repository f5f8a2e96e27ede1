"""The oracles on cases small enough to compute by hand, and against facts that do not depend on them."""

import numpy as np
import oracles
import pytest

BASE = np.array([[1.0, 2.0], [3.0, 4.0]])
A = BASE + np.array([[4.0, -1.0], [2.0, 0.0]])
B = BASE + np.array([[-2.0, -3.0], [1.0, 0.5]])


def equal(actual: object, expected: object) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-15, atol=1e-15)


# Methods


def test_linear_is_the_weighted_mean():
    equal(oracles.linear([A, B], [3.0, 1.0]), [[3.5, 0.5], [4.75, 4.125]])
    equal(oracles.linear([A, B], [3.0, 1.0], normalize=False), [[14.0, 2.0], [19.0, 16.5]])


def test_linear_refuses_weights_that_sum_to_zero():
    with pytest.raises(ValueError, match="sum to zero"):
        oracles.linear([A, B], [1.0, -1.0])


def test_slerp_of_perpendicular_vectors_uses_sine_and_cosine():
    a, b = np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 1.0]])
    equal(oracles.slerp(a, b, 1 / 3), [[2 * np.cos(np.pi / 6), 0.0], [0.0, np.sin(np.pi / 6)]])


@pytest.mark.parametrize("sign", [1, -1])
def test_slerp_of_colinear_vectors_is_linear(sign):
    equal(oracles.slerp(BASE, sign * 3 * BASE, 0.25), (0.75 + sign * 0.75) * BASE)


def test_slerp_ends_at_its_ends():
    equal(oracles.slerp(A, B, 0.0), A)
    equal(oracles.slerp(A, B, 1.0), B)


def test_task_arithmetic_sums_deltas():
    equal(oracles.task_arithmetic(BASE, [A, B], 1.0), [[3.0, -2.0], [6.0, 4.5]])
    equal(oracles.task_arithmetic(BASE, [A, B], [1.0, 2.0], lambda_=0.5), [[1.0, -1.5], [5.0, 4.5]])
    equal(oracles.task_arithmetic(BASE, [A, B], [1.0, 3.0], normalize=True), [[0.5, -0.5], [4.25, 4.375]])


def test_task_arithmetic_with_weights_that_cancel_is_not_divided():
    expected = BASE + np.array([[6.0, 2.0], [1.0, -0.5]])
    equal(oracles.task_arithmetic(BASE, [A, B], [1.0, -1.0], normalize=True), expected)


@pytest.mark.parametrize(
    ("density", "kept"),
    [
        (0.0, [0, 0, 0, 0, 0]),
        (0.01, [0, 0, 0, -4, 0]),  # k is at least 1
        (0.59, [0, 2, -2, -4, 0]),  # int(0.59 * 5) = 2, and both 2 are at the threshold
        (0.8, [1, 2, -2, -4, 0]),
        (1.0, [1, 2, -2, -4, 0.5]),
        (2.0, [1, 2, -2, -4, 0.5]),
    ],
)
def test_trim_keeps_the_largest_and_everything_tied_with_them(density, kept):
    equal(oracles.trim([1, 2, -2, -4, 0.5], density), kept)


def test_trim_compares_in_float32():
    almost = 1.0 + 2.0**-30
    equal(oracles.trim([almost, 1.0, 0.5], 1 / 3), [almost, 1.0, 0.0])


def test_ties_elects_by_weighted_sum_and_averages_those_that_agree():
    # deltas [4 -1; 2 0] and [-2 -3; 1 .5]: the first element goes to +, of which only A is in favour
    equal(oracles.ties(BASE, [A, B], 1.0) - BASE, [[4.0, -2.0], [1.5, 0.5]])
    # with three times the weight, B wins the first element
    equal(oracles.ties(BASE, [A, B], [1.0, 3.0]) - BASE, [[-2.0, -2.5], [1.25, 0.5]])
    equal(oracles.ties(BASE, [A, B], [1.0, 3.0], normalize=False) - BASE, [[-6.0, -10.0], [5.0, 1.5]])


def test_ties_trims_before_it_elects():
    # the top half: [4 0; 2 0] and [-2 -3; 0 0]
    equal(oracles.ties(BASE, [A, B], 1.0, density=0.5, lambda_=2.0) - BASE, [[8.0, -6.0], [4.0, 0.0]])
    equal(oracles.ties(BASE, [A, B], 1.0, density=[0.5, 0.0]) - BASE, [[4.0, 0.0], [2.0, 0.0]])


def test_ties_elects_plus_where_deltas_cancel():
    equal(oracles.ties([0.0], [[1.0], [-1.0]], 1.0), [1.0])
    equal(oracles.ties([0.0], [[0.0], [0.0]], 1.0), [0.0])


def test_ties_with_a_negative_weight_turns_that_source_around():
    equal(oracles.ties([0.0], [[1.0], [-3.0]], [1.0, -1.0], normalize=False), [4.0])
    # the agreeing weights cancel: the divisor counts as 1
    equal(oracles.ties([0.0], [[1.0], [-3.0]], [1.0, -1.0], normalize=True), [4.0])


def test_ties_over_a_model_trims_with_one_threshold():
    base = {"small": np.zeros(3), "large": np.zeros(3), "steps": np.array([7])}
    source = {
        "small": np.array([0.1, 0.2, 0.3]),
        "large": np.array([1.0, -2.0, 3.0]),
        "steps": np.array([9]),
    }
    merged = oracles.ties_model(base, [source], 1.0, density=2 / 3)
    equal(merged["small"], [0.0, 0.0, 0.3])
    equal(merged["large"], [1.0, -2.0, 3.0])
    assert merged["steps"].tolist() == [7]
    per_tensor = oracles.ties(base["small"], [source["small"]], 1.0, density=2 / 3)
    equal(per_tensor, [0.0, 0.2, 0.3])
    emptied = oracles.ties_model(base, [source], 1.0, density=0.0)
    equal(emptied["large"], [0.0, 0.0, 0.0])


def test_ties_over_a_model_counts_a_tied_tensor_once():
    base = {"embedding": np.zeros(2), "body": np.zeros(2), "head": np.zeros(2)}
    shared = np.array([3.0, 4.0])
    source = {"embedding": shared, "body": np.array([1.0, 2.0]), "head": shared}
    once = oracles.ties_model(base, [source], 1.0, density=0.75, tied={"head": "embedding"})
    equal(once["body"], [0.0, 2.0])  # the third largest of four
    equal(once["head"], shared)
    twice = oracles.ties_model(base, [source], 1.0, density=0.75)
    equal(twice["body"], [0.0, 0.0])  # the fourth largest of six


def test_ties_over_one_tensor_is_ties():
    generator = np.random.default_rng(0)
    base, *sources = generator.normal(size=(4, 31))
    options = {"weight": [1.0, 0.5, -0.25], "density": [0.2, 0.5, 0.9], "lambda_": 0.7}
    over_model = oracles.ties_model({"x": base}, [{"x": s} for s in sources], **options)
    equal(over_model["x"], oracles.ties(base, sources, **options))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_with_equal_weights_ties_is_the_one_of_the_paper(density, weight):
    base, *sources = np.random.default_rng(1).normal(size=(5, 6, 7))
    np.testing.assert_allclose(
        oracles.ties(base, sources, weight, density, lambda_=0.8),
        oracles.ties_paper(base, sources, density, lambda_=0.8),
        rtol=1e-13,
    )


def test_the_paper_settles_a_draw_by_majority():
    # sums -1, -1, 0: the paper elects minus for the last, the weighted form plus
    first, second = [-1.0, -1.0, 2.0], [0.0, 0.0, -2.0]
    equal(oracles.ties_paper(np.zeros(3), [first, second], 1.0), [-1.0, -1.0, -2.0])
    equal(oracles.ties(np.zeros(3), [first, second], 1.0), [-1.0, -1.0, 2.0])


MASKS = [np.array([[True, False], [True, True]]), np.array([[True, True], [False, True]])]


def test_dare_divides_what_it_keeps_by_the_density():
    # kept: [4 0; 2 0] and [-2 -3; 0 .5], doubled
    equal(oracles.dare(BASE, [A, B], MASKS, 1.0, 0.5) - BASE, [[4.0, -6.0], [4.0, 1.0]])
    equal(oracles.dare(BASE, [A, B], MASKS, 1.0, 0.5, rescale=False) - BASE, [[2.0, -3.0], [2.0, 0.5]])
    equal(oracles.dare(BASE, [A, B], MASKS, [1.0, 3.0], 0.5, normalize=True) - BASE, [[-1, -4.5], [1, 0.75]])


def test_dare_can_restore_the_l1_norm_instead():
    # |A| sums to 7, of which 6 are kept; |B| sums to 6.5, of which 5.5 are kept
    a, b = 7 / 6, 6.5 / 5.5
    expected = [[4 * a - 2 * b, -3 * b], [2 * a, 0.5 * b]]
    equal(oracles.dare(BASE, [A, B], MASKS, 1.0, 0.5, rescale="l1") - BASE, expected)


def test_dare_with_consensus_elects():
    merged = oracles.dare(BASE, [A, B], MASKS, 1.0, 0.5, rescale=False, consensus=True, normalize=True)
    equal(merged - BASE, [[4.0, -3.0], [2.0, 0.5]])


def test_dare_at_full_density_ignores_masks_and_at_none_keeps_nothing():
    nothing = [np.zeros((2, 2), dtype=bool)] * 2
    equal(oracles.dare(BASE, [A, B], nothing, 1.0, 1.0), oracles.task_arithmetic(BASE, [A, B], 1.0))
    equal(oracles.dare(BASE, [A, B], MASKS, 1.0, 0.0), BASE)


def test_passthrough_scales():
    equal(oracles.passthrough(BASE), BASE)
    equal(oracles.passthrough(BASE, 0.5), [[0.5, 1.0], [1.5, 2.0]])


# Rounding

FORMATS = {
    "bfloat16": (oracles.round_to_bfloat16, oracles.widen_bfloat16, 0x7F80),
    "float16": (oracles.round_to_float16, oracles.widen_float16, 0x7C00),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_finite_value_survives_widening_and_rounding(name):
    round_, widen, infinity = FORMATS[name]
    bits = np.arange(0, infinity + 1, dtype=np.uint16)
    np.testing.assert_array_equal(round_(widen(bits)), bits)
    np.testing.assert_array_equal(round_(-widen(bits)), bits | 0x8000)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_breaks_at_midpoints_and_ties_go_to_even(name):
    round_, widen, infinity = FORMATS[name]
    lower = np.arange(0, infinity - 1, 7, dtype=np.uint16)
    upper = lower + np.uint16(1)
    middle = (widen(lower) + widen(upper)) / 2  # exact: both have few bits
    np.testing.assert_array_equal(round_(np.nextafter(middle, 0.0)), lower)
    np.testing.assert_array_equal(round_(np.nextafter(middle, np.inf)), upper)
    np.testing.assert_array_equal(round_(middle), np.where(lower % 2 == 0, lower, upper))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_overflows_half_a_step_beyond_the_largest(name):
    round_, widen, infinity = FORMATS[name]
    largest, below = widen(np.array([infinity - 1, infinity - 2], dtype=np.uint16))
    edge = largest + (largest - below) / 2
    assert int(round_(np.nextafter(edge, 0.0))) == infinity - 1
    assert int(round_(edge)) == infinity
    assert int(round_(-np.inf)) == infinity | 0x8000
    assert np.isnan(widen(round_(np.nan)))
    assert int(round_(-0.0)) == 0x8000


def test_rounding_to_float16_and_float32_is_numpys():
    generator = np.random.default_rng(2)
    values = generator.normal(size=4000) * np.exp2(generator.integers(-30, 17, size=4000))
    with np.errstate(over="ignore", under="ignore"):
        half, single = values.astype(np.float16), values.astype(np.float32)
    np.testing.assert_array_equal(oracles.round_to_float16(values), half.view(np.uint16))
    np.testing.assert_array_equal(oracles.round_to_float32(values), single.view(np.uint32))
    np.testing.assert_array_equal(oracles.widen_float16(half.view(np.uint16)), half.astype(np.float64))


def test_rounding_to_bfloat16_rounds_once():
    # just above the midpoint of 1 and 1 + 2^-7: by way of float32 it would land on the midpoint, then on 1
    assert int(oracles.round_to_bfloat16(1 + 2.0**-8 + 2.0**-30)) == 0x3F81


def test_bfloat16_is_the_upper_half_of_float32():
    bits = np.arange(0x10000, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        upper_half = (bits << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(oracles.widen_bfloat16(bits), upper_half)


# Random numbers


@pytest.mark.parametrize(("counter", "key", "expected"), oracles.PHILOX_VECTORS)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert oracles.philox2x32(counter, key) == expected


def test_philox_is_a_permutation_of_the_counters():
    results = {oracles.philox2x32((i, j), key=5) for i in range(64) for j in range(64)}
    assert len(results) == 64 * 64
