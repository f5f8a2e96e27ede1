"""The greedy choice: the published algorithm, never worse than the best model, and as many evaluations as stated."""

from __future__ import annotations

import itertools
import math

import oracles
from hypothesis import given
from hypothesis import strategies as st

from mergetool.facts.soup import evaluations, greedy, reads

COUNTS = st.integers(1, 5)
LOSSES = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e6, 1e6))
"""Whole numbers too, so that there are ties."""


@st.composite
def tables(draw):
    """The loss of every average of some models."""
    count = draw(COUNTS)
    every = [m for size in range(1, count + 1) for m in itertools.combinations(range(count), size)]
    return count, {members: draw(LOSSES) for members in every}


@given(tables())
def test_a_soup_is_never_worse_than_the_best_model(table):
    count, losses = table
    soup = greedy(count, losses.__getitem__)
    assert soup.loss <= min(losses[i,] for i in range(count))
    assert losses[soup.best,] == min(losses[i,] for i in range(count))
    assert soup.best in soup.members


@given(tables())
def test_the_choice_is_that_of_the_published_algorithm(table):
    count, losses = table
    expected = oracles.greedy_soup([-losses[i,] for i in range(count)], lambda members: -losses[tuple(members)])
    assert greedy(count, losses.__getitem__).members == tuple(sorted(expected))


@given(tables())
def test_as_many_are_tried_as_is_said_beforehand_and_each_once(table):
    count, losses = table
    asked = []
    soup = greedy(count, lambda members: asked.append(members) or losses[members])
    assert asked == list(soup.tried)
    assert len(asked) == len(set(asked)) == evaluations(count)
    assert sum(map(len, asked)) <= reads(count)


def test_all_models_are_read_as_often_as_is_said_where_each_helps():
    for count in range(1, 6):
        soup = greedy(count, lambda members: -len(members))
        assert soup.members == tuple(range(count))
        assert sum(map(len, soup.tried)) == reads(count)


def test_ties_are_added_and_of_equals_the_first_is_the_best():
    soup = greedy(3, lambda members: 1.0)
    assert (soup.best, soup.members) == (0, (0, 1, 2))


def test_a_mean_without_a_number_is_left_out():
    soup = greedy(2, lambda members: math.nan if len(members) > 1 else members[0])
    assert soup.members == (0,)
