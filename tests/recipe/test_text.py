"""YAML to nodes: places, strictness, bounds."""

from __future__ import annotations

import time

import pytest

from mergetool.recipe.text import MOST_DEPTH, parse
from mergetool.recipe.tree import shorten


def only(text: str):
    _, problems = parse(text, "r.yaml")
    assert len(problems) == 1, problems
    return problems[0]


def test_every_value_knows_its_place():
    root, problems = parse("a: 1\nb:\n  - x: [2, 3]\n    y:\n", "r.yaml")
    assert problems == []
    assert root.plain() == {"a": 1, "b": [{"x": [2, 3], "y": None}]}
    places = {path: root.nearest(path).place for path in [("a",), ("b",), ("b", 0), ("b", 0, "x", 1), ("b", 0, "y")]}
    assert places == {
        ("a",): "r.yaml:1:4",
        ("b",): "r.yaml:2:1",  # a block stands where its key does
        ("b", 0): "r.yaml:3:5",
        ("b", 0, "x", 1): "r.yaml:3:12",
        ("b", 0, "y"): "r.yaml:4:5",  # so does nothing at all
    }
    assert root.nearest(("b", 7, "z")).place == "r.yaml:2:1"
    assert root.nearest(("b", 0, "x")).key == "r.yaml:3:5"


def test_columns_count_characters():
    root, _ = parse("ä: {ö: ü}", "r.yaml")
    assert root.nearest(("ä", "ö")).place == "r.yaml:1:8"


def test_keys_stay_text():
    root, _ = parse("on: 1\n2: 3\n~: 4\n", "r.yaml")
    assert root.plain() == {"on": 1, "2": 3, "~": 4}


def test_scalars_are_those_of_yaml_1_1():
    root, _ = parse("[1, 0x10, 1.5, 1e-5, .inf, yes, off, ~, 2024-01-01, '7', !!str 7, \"\"]", "r.yaml")
    assert root.plain() == [1, 16, 1.5, "1e-5", float("inf"), True, False, None, "2024-01-01", "7", "7", ""]


def test_anchors_and_merge_keys():
    root, problems = parse("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: *a\nd: {<<: [*a, {z: 4}]}\n", "r.yaml")
    assert problems == []
    assert root.plain()["b"] == {"y": 3, "x": 1}
    assert root.plain()["d"] == {"x": 1, "y": 2, "z": 4}
    assert root.nearest(("c",)).place == "r.yaml:5:4"
    root.value["c"].value["x"].value = 9
    assert root.plain()["a"]["x"] == 1


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3:1", "`a` is set twice in the same mapping"),
        ("a: [1\nb: 2\n", "r.yaml:2:2", "not valid YAML"),
        ("a:\n\t- 1\n", "r.yaml:2:1", "not valid YAML: found character that cannot start any token"),
        ("a: 1\n--- \nb: 2\n", "r.yaml:2:1", "single YAML document"),
        ("a: *b\n", "r.yaml:1:4", "the alias `*b` has no anchor `&b` before it"),
        ("a: &a [*a]\n", "r.yaml:1:8", "the alias `*a` has no anchor"),
        ("a: !!python/name:os.system x\n", "r.yaml:1:4", "the tag `tag:yaml.org,2002:python/name:os.system`"),
        ("a: !!python/object:x {b: 1}\n", "r.yaml:1:4", "is not allowed"),
        ("a: !!int x\n", "r.yaml:1:4", "'x' cannot be read as int"),
        ("a: " + "9" * 5000, "r.yaml:1:4", "cannot be read as int"),
        ("a: 0x" + "f" * 5000, "r.yaml:1:4", "cannot be read as int"),
        ("{[a]: 1}", "r.yaml:1:2", "a key must be plain text"),
        ("a: 1\nb: \x07\n", "r.yaml:2:4", "the character '\\x07' is not allowed in YAML"),
        ("a: \ud800\n", "r.yaml:1:4", "is not allowed in YAML"),
        ("<<: 3\n", "r.yaml:1:5", "`<<` merges mappings"),
        ("[" * 100, f"r.yaml:1:{MOST_DEPTH + 2}", "nested more than"),
    ],
)
def test_mistakes(text, where, what):
    problem = only(text)
    assert problem.where == where
    assert what in problem.what


def test_the_first_of_two_keys_is_named():
    assert only("a: 1\nb: 2\na: 3\n").fix == "keep one; the first is at r.yaml:1:1"


def test_a_bomb_of_aliases_is_refused_quickly():
    lines = ["a0: &a0 [" + "x, " * 50 + "x]"]
    lines += [f"a{i}: &a{i} [" + f"*a{i - 1}, " * 50 + "x]" for i in range(1, 20)]
    start = time.perf_counter()
    assert "more than 200000 values" in only("\n".join(lines)).what
    assert time.perf_counter() - start < 5


def test_a_chain_of_aliases_is_refused_before_it_is_deep():
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 300))]
    assert "nested more than" in only("\n".join(lines)).what


def test_nothing_is_no_node():
    assert parse("", "r.yaml") == (None, [])
    assert parse("# only a comment\n", "r.yaml") == (None, [])


def test_long_texts_are_shortened():
    assert shorten("a" * 60) == "a" * 60
    assert shorten("a" * 61) == "a" * 59 + "…"
