"""Filters and gradients against values computed by hand."""

from __future__ import annotations

import pytest

from mergetool.recipe.settings import UNSET, at_depth, constant, evaluate, matches, scalars, setting

Q = "model.layers.3.self_attn.q_proj.weight"
UP = "model.layers.3.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("gradient", "depth", "value"),
    [
        ((0, 1), 0.0, 0.0),
        ((0, 1), 0.25, 0.25),
        ((0, 1), 1.0, 1.0),
        ((0, 0.5, 0.3, 0.7, 1), 0.125, 0.25),  # halfway from 0 to 0.5
        ((0, 0.5, 0.3, 0.7, 1), 0.25, 0.5),
        ((0, 0.5, 0.3, 0.7, 1), 0.375, 0.4),  # halfway from 0.5 to 0.3
        ((0, 0.5, 0.3, 0.7, 1), 0.9375, 0.925),  # three quarters from 0.7 to 1
        ((0.7,), 0.6, 0.7),
        (("1e-2", 0.03), 0.5, 0.02),
        ((1, 2), -3.0, 1.0),
        ((1, 2), 3.0, 2.0),
        ((True, False), 0.0, True),
        ((True, False), 0.99, True),
        ((True, False), 1.0, False),
        (("a", "b", "c"), 0.5, "b"),
        (("a", "b", "c"), 0.49, "a"),
    ],
)
def test_gradients(gradient, depth, value):
    found = at_depth(gradient, depth)
    assert found == pytest.approx(value) if isinstance(value, float) else found is value or found == value


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("self_attn", Q, True),
        ("self_attn", UP, False),
        ("*.q_proj.*", Q, True),
        ("q_proj*", Q, False),  # a glob is matched against the whole name
        ("model.layers.?.mlp.*", UP, True),
        ("*layers.[0-2].*", UP, False),
        ("", Q, True),
    ],
)
def test_filters(pattern, name, found):
    assert matches(pattern, name) is found


def test_the_first_condition_that_matches_wins():
    t = setting(
        [
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5},
        ]
    )
    assert evaluate(t, Q, 0.125) == pytest.approx(0.25)
    assert evaluate(t, UP, 0.125) == pytest.approx(0.75)
    assert evaluate(t, NORM, 0.125) == 0.5


def test_no_match_is_unset():
    assert evaluate(setting({"filter": "mlp", "value": 1}), Q, 0.0) is UNSET
    assert repr(UNSET) == "UNSET"


def test_a_star_matches_all():
    assert evaluate(setting([{"filter": "*", "value": 3}, {"value": 4}]), Q, 0.0) == 3


def test_constants():
    assert constant(setting(1))
    assert constant(setting([{"value": 1}]))
    assert not constant(setting([0, 1]))
    assert not constant(setting({"filter": "mlp", "value": 1}))


def test_every_scalar_has_its_path():
    raw = [{"filter": "mlp", "value": [1, 2]}, {"value": 3}]
    assert scalars(raw) == [((0, "value", 0), 1), ((0, "value", 1), 2), ((1, "value"), 3)]
    assert [condition.path for condition in setting(raw)] == [(0,), (1,)]
