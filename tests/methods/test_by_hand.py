"""Every method on two by two numbers, worked out by hand."""

import numpy as np
import pytest

from mergetool.kernels.random import draws, key
from mergetool.methods.bare import merge_tensors
from methods.cases import BARE as METHODS

BASE = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
A = BASE + np.array([[4.0, -1.0], [2.0, 0.0]], np.float32)  # 5 1 5 4
B = BASE + np.array([[-2.0, -3.0], [1.0, 0.5]], np.float32)  # -1 -1 4 4.5
PERPENDICULAR = np.array([[-2.0, 1.0], [0.0, 0.0]], np.float32)

HAND = {
    # (3·A + 1·B) / 4
    "linear": ([A, B], None, {"weight": [3.0, 1.0]}, [[3.5, 0.5], [4.75, 4.125]]),
    # ½·base + ½·value for parallel ends; the other case is below
    "slerp": ([BASE * 3], BASE, {"t": 0.5}, [[2.0, 4.0], [6.0, 8.0]]),
    # base + 0.5 · (2·a + 1·b) = base + 0.5 · (6, -5, 5, 0.5)
    "task_arithmetic": ([A, B], BASE, {"weight": [2.0, 1.0], "lambda": 0.5}, [[4.0, -0.5], [5.5, 4.25]]),
    # half of each delta: a → (4, 0, 2, 0), b → (-2, -3, 0, 0); signs of the totals (2, -3, 2, 0): + - + +
    # agreeing: 4 | -3 | 2 | nothing
    "ties": ([A, B], BASE, {"weight": 1.0, "density": 0.5}, [[5.0, -1.0], [5.0, 4.0]]),
    # everything kept: base + a + b = base + (2, -4, 3, 0.5)
    "dare_linear": ([A, B], BASE, {"weight": 1.0}, [[3.0, -2.0], [6.0, 4.5]]),
    # everything kept; totals (2, -4, 3, 0.5) elect + - + +; agreeing: 4 | -1 - 3 | 2 + 1 | 0.5
    "dare_ties": ([A, B], BASE, {"weight": 1.0}, [[5.0, -2.0], [6.0, 4.5]]),
    "passthrough": ([A], None, {"scale": 0.5}, [[2.5, 0.5], [2.5, 2.0]]),
}


def test_every_method_is_worked_out_by_hand():
    """A new method is listed in HAND."""
    assert set(HAND) == set(METHODS)


@pytest.mark.parametrize("name", HAND)
def test_two_by_two_numbers(name):
    tensors, base, parameters, expected = HAND[name]
    merged = merge_tensors(name, tensors, base, parameters=parameters)
    np.testing.assert_array_equal(merged, np.array(expected, np.float32))


def test_slerp_walks_the_arc_between_perpendicular_tensors():
    """A third of a right angle: cos 30° of one and sin 30° of the other."""
    a = np.array([[1.0, 2.0], [0.0, 0.0]], np.float32)
    merged = merge_tensors("slerp", [PERPENDICULAR], a, t=1 / 3)
    expected = np.cos(np.pi / 6) * a.astype(np.float64) + 0.5 * PERPENDICULAR
    np.testing.assert_allclose(merged, expected, rtol=2e-7)


def test_dare_keeps_where_the_draw_is_below_the_density_and_divides_by_it():
    mask = draws(key(3, "a", "w"), 0, 4).reshape(2, 2) < 0.5
    assert 0 < mask.sum() < 4, "the case should drop something and keep something"
    merged = merge_tensors("dare_linear", [A], BASE, weight=1.0, density=0.5, seed=3, sources=["a"], name="w")
    np.testing.assert_array_equal(merged, BASE + 2.0 * mask * (A - BASE))


def test_dare_l1_restores_the_sum_of_magnitudes():
    merged = merge_tensors(
        "dare_linear", [A], BASE, weight=1.0, density=0.5, rescale="l1", seed=3, sources=["a"], name="w"
    )
    np.testing.assert_allclose(np.abs(merged - BASE).sum(), np.abs(A - BASE).sum(), rtol=1e-6)
