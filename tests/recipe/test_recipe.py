"""What a recipe says about one tensor: levels, rules, usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergetool.anatomy import Part
from mergetool.methods import METHODS
from mergetool.recipe import Usage, load
from mergetool.recipe.rules import Where, in_layers

from .full import FULL

TEXT = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight: [{filter: mlp, value: [0, 1]}]
  - model: b
    parameters: {density: 0.25}
parameters:
  weight: 0.5
  density: [{filter: nothing, value: 1}, {value: 0.75}]
rules:
  - where: {part: attention, layers: -1}
    parameters: {lambda: 2}
    models:
      - model: b
        parameters: {weight: 0.125}
  - where: {part: [norm, head]}
    merge_method: linear
    parameters: {weight: 1}
  - where: {name: "*.rotary.*"}
    drop: true
  - where: {part: embedding}
    keep: a
"""


def part(role: str, layer: int | None = None, layers: int = 4) -> Part:
    return Part(role, "model.layers", layer, layers, 0.0, None, None, False)


@pytest.fixture
def recipe():
    return load(TEXT)


def test_the_nearest_level_speaks_first(recipe):
    ties = METHODS["ties"]
    up = recipe.parameters_for(ties, "layers.1.mlp.up", 0.25, ["a", "b"])
    assert up.problems == ()
    assert up.values["weight"] == (0.25, 0.5)  # a's gradient; the recipe's, as b has none
    assert up.values["density"] == (0.75, 0.25)
    assert up.values["lambda"] == 1.0
    assert up.arguments["lambda_"] == 1.0
    q = recipe.parameters_for(ties, "layers.1.attn.q", 0.25, ["a", "b"])
    assert q.values["weight"] == (0.5, 0.5)  # a's filter does not match, so the recipe's


def test_a_rule_speaks_before_the_models(recipe):
    rule = recipe.rule_for("layers.3.attn.q", part("attention.q", 3))
    assert rule is recipe.rules[0]
    found = recipe.parameters_for(recipe.method(rule), "layers.3.attn.q", 1.0, ["a", "b"], rule)
    assert found.values["weight"] == (0.5, 0.125)
    assert found.values["lambda"] == 2.0


def test_a_rule_of_another_method_skips_what_it_lacks(recipe):
    rule = recipe.rule_for("norm", part("norm"))
    method = recipe.method(rule)
    assert method.name == "linear"
    assert recipe.merged_by(method) == ("base", "a", "b")
    assert recipe.parameters_for(method, "norm", 1.0, ["base", "a", "b"], rule).values == {
        "weight": (1.0, 1.0, 1.0),
        "normalize": True,
    }


def test_the_first_rule_wins(recipe):
    assert recipe.rule_for("x.rotary.y", part("embedding")).drop
    assert recipe.rule_for("x.embed", part("embedding")).keep == "a"
    assert recipe.rule_for("layers.2.attn.q", part("attention.q", 2)) is None


def test_what_nothing_sets_is_a_problem_with_a_place():
    recipe = load(TEXT.replace("  weight: 0.5\n", "  weight: [{filter: attn, value: 1}]\n"))
    found = recipe.parameters_for(METHODS["ties"], "layers.0.mlp.up", 0.0, ["a", "b"])
    assert [(p.where, p.what, p.fix) for p in found.problems] == [
        (
            "<text>:11:11",
            "`ties` needs `weight` for b, which nothing sets",
            "add an entry without `filter`",
        )
    ]
    assert "weight" not in found.values
    assert found.values["density"] == (0.75, 0.25)


def test_text_numbers_become_numbers():
    recipe = load("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 1e-1}\n")
    assert recipe.parameters_for(recipe.method(), "x", 0.0, ["b"]).values == {"t": 0.1}


def test_unused_filters_and_rules(recipe):
    usage = Usage(recipe)
    assert usage.filters_unused() == [
        ("parameters", "density", 0, "filter"),
        ("models", 1, "parameters", "weight", 0, "filter"),
    ]
    recipe.rule_for("layers.3.mlp.up", part("mlp.up", 3), usage)
    recipe.rule_for("layers.3.attn.q", part("attention.q", 3), usage)
    recipe.rule_for("norm", part("norm"), usage)
    assert usage.filters_unused() == [("parameters", "density", 0, "filter")]
    assert usage.rules_unused() == [("rules", 2), ("rules", 3)]
    assert recipe.where(*usage.filters_unused()[0]) == "<text>:12:22"
    assert recipe.where(*usage.rules_unused()[0]) == "<text>:22:5"


@pytest.mark.parametrize(
    ("spans", "layer", "found"),
    [
        (((0, 3),), 3, True),
        (((0, 3),), 4, False),
        (((-1, -1),), 11, True),
        (((-4, -2),), 8, True),
        (((-4, -2),), 11, False),
        (((1, -2),), 10, True),
        (((1, 1), (5, 5)), 5, True),
        (((0, 11),), None, False),
    ],
)
def test_layers(spans, layer, found):
    assert in_layers(spans, layer, 12) is found


def test_where_needs_everything_said():
    where = Where(part=("attention",), layers=((0, 1),), name=("*q*", "*k*"))
    assert where.matches("0.k", part("attention.k", 0))
    assert not where.matches("0.v", part("attention.v", 0))
    assert not where.matches("2.k", part("attention.k", 2))
    assert not where.matches("0.k", part("attentive", 0))


def test_sources():
    linear = "merge_method: linear\nbase_model: z\nmodels: [{model: b}, {model: a}]\nparameters: {weight: 1}\n"
    assert load(linear).sources == ("b", "a")
    assert load(linear + "rules:\n  - {where: {part: norm}, keep: z}\n").sources == ("z", "b", "a")
    ties = linear.replace("linear", "ties")
    assert load(ties).sources == ("z", "b", "a")
    assert load(ties).merged_by(METHODS["ties"]) == ("b", "a")
    assert load(ties.replace("[{model: b}", "[{model: b}, {model: z}")).sources == ("b", "z", "a")


def test_places():
    recipe = load(FULL)
    assert recipe.where("models", 2, "parameters", "weight") == "<text>:13:26"
    assert recipe.where("models", 1, "parameters", "density", 0, "value", 1) == "<text>:10:24"
    assert recipe.where("models", 1, "parameters", "nothing") == "<text>:6:5"
    assert recipe.where() == "<text>:1:1"


def test_canonical_is_plain_and_ignores_layout():
    recipe = load(FULL)
    canonical = recipe.canonical()
    assert json.loads(json.dumps(canonical)) == canonical
    assert load("# a comment\n" + FULL.replace("output: merged", "output: elsewhere")).canonical() == canonical
    assert load(FULL.replace("seed: 7", "seed: 8")).canonical() != canonical
    assert recipe.stored_dtype == "float16"
    assert recipe.models[1].reference == "org/code@main+org/lora@v1"


def test_folder(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(FULL)
    recipe = load(file)
    assert recipe.folder == tmp_path
    assert recipe.text == FULL
    assert recipe.where("seed") == f"{file}:36:7"
    assert load(FULL).folder is None
