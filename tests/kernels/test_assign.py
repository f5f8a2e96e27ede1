"""The assignment is the best there is, on the fast path and off it."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergetool.kernels.assign import assign, worthwhile

SQUARES = st.integers(0, 5).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.integers(-4, 4)))


@given(SQUARES)
def test_no_permutation_scores_more(scores):
    size = len(scores)
    order = assign(scores)

    assert sorted(order) == list(range(size))
    best = max(sum(scores[i, p] for i, p in enumerate(each)) for each in permutations(range(size)))
    assert scores[np.arange(size), order].sum() == best


def test_the_fast_path_does_not_solve(monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError

    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", unwanted)
    random = np.random.default_rng(0)
    wanted = random.permutation(50)
    scores = random.normal(size=(50, 50)) * 0.1
    scores[np.arange(50), wanted] += 2

    np.testing.assert_array_equal(assign(scores.astype(np.float32)), wanted)


def test_equal_scores_leave_everything_where_it_is():
    np.testing.assert_array_equal(assign(np.ones((6, 6))), np.arange(6))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(bad):
    with pytest.raises(ValueError, match="NaN or an infinity"):
        assign(np.array([[1.0, bad], [0.0, 1.0]]))


def test_scores_must_be_square():
    with pytest.raises(ValueError, match="not square"):
        assign(np.ones((2, 3)))


def test_only_cycles_worth_a_move_are_kept():
    scores = np.eye(5)
    scores[[0, 1], [1, 0]] = 1.001  # a gain of a thousandth
    scores[[2, 3, 4], [3, 4, 2]] = 1.5

    order = assign(scores)
    np.testing.assert_array_equal(order, [1, 0, 3, 4, 2])
    np.testing.assert_array_equal(worthwhile(scores, order, np.ones(5), 0.01), [0, 1, 3, 4, 2])
    np.testing.assert_array_equal(worthwhile(scores, order, np.ones(5), 0.0), order)
    np.testing.assert_array_equal(worthwhile(scores, order, np.ones(5), 0.9), np.arange(5))


@given(SQUARES, st.floats(0, 2))
def test_what_is_kept_is_a_permutation_that_loses_nothing(scores, margin):
    here = np.arange(len(scores))
    kept = worthwhile(scores, assign(scores), np.ones(len(scores)), margin)

    assert sorted(kept) == list(here)
    assert scores[here, kept].sum() >= scores[here, here].sum()
