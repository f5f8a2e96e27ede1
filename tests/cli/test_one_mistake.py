"""One mistake is one error, however many tensors and sources it is about and whatever follows from it."""

from __future__ import annotations

import re

import pytest
from plan.models import llama, save

LINEAR = """\
merge_method: linear
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
    parameters: {weight: 0.5}
"""
TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1, density: 0.5}
  - model: b
    parameters: {weight: [0.25, 1], density: 0.5}
parameters:
  normalize: true
  lambda: 0.8
"""
SLERP = """\
merge_method: slerp
base_model: base
models:
  - model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 1]
    - value: 0.5
"""
RULES = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
  - model: b
parameters: {weight: 0.4}
rules:
  - where: {part: mlp}
    merge_method: ties
    parameters: {density: 0.5, weight: 1}
  - where: {part: norm}
    keep: base
"""
RECIPES = {"linear": LINEAR, "ties": TIES, "slerp": SLERP, "rules": RULES}
WRONG = ["abc", "true", "[0.5, abc]", "{value: abc}", "[{filter: mlp, value: abc}, {value: 1}]", ".inf", "", "[]", "{}"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of twelve layers, so that what is said tensor by tensor would be said often."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        save(folder / name, llama(seed, layers=12))
    return folder


@pytest.fixture
def errors(models, run):
    """Check a recipe; the errors it gives."""

    def call(text, *options):
        (models / "merge.yaml").write_text(text)
        found = run("check", models / "merge.yaml", *options)
        assert found.exit_code == (2 if "error:" in found.stderr else 0), found.stderr
        return re.findall(r"^error: (.*)$", found.stderr, re.MULTILINE)

    return call


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_right_as_they_are(errors, name):
    assert errors(RECIPES[name]) == []


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("linear", "weight: 0.5"),
        ("ties", "weight: 1"),
        ("ties", "density: 0.5"),
        ("ties", "lambda: 0.8"),
        ("slerp", "t:"),
        ("rules", "weight: 0.4"),
        ("rules", "density: 0.5"),
        ("rules", "weight: 1"),
    ],
)
def test_a_wrong_value_is_one_error(errors, name, setting, value):
    text, key = RECIPES[name], setting.split(":")[0]
    end = len(text) if setting == "t:" else text.index(setting) + len(setting)
    (error,) = errors(f"{text[: text.index(setting)]}{key}: {value}{text[end:]}")
    assert re.search(r"merge\.yaml:\d+:\d+: ", error)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("linear", "weight: 0.5", ""),  # of one model
        ("linear", "    parameters: {weight: 0.5}\n", ""),
        ("ties", "weight: 1, ", ""),
        ("ties", "normalize: true", "normalize: 3"),
        ("ties", "lambda: 0.8", "lambada: 0.8"),
        ("ties", "lambda: 0.8", "wholly_unknown: 0.8"),
        ("ties", "weight: 1,", "wholly_unknown: 1,"),
        ("ties", "parameters: {weight: 1, density: 0.5}", "parameters: 3"),
        ("ties", "density: 0.5", "density: 1.5"),
        ("slerp", SLERP[SLERP.index("parameters") :], ""),
        ("slerp", "    - value: 0.5\n", ""),  # some tensors then have none
        ("rules", "parameters: {weight: 0.4}\n", ""),
        ("rules", ", weight: 1}", ", scope: modle}"),
    ],
)
def test_what_is_missing_or_misspelled_is_one_error(errors, name, old, new):
    text = RECIPES[name]
    assert old in text
    assert len(errors(text.replace(old, new, 1))) == 1


def test_a_parameter_that_no_model_has_is_one_error(errors):
    assert len(errors(LINEAR.replace("    parameters: {weight: 0.5}\n", ""))) == 1


@pytest.mark.parametrize("weights", [("0.5", "-0.5"), ("[1, 0.5]", "[-1, -0.5]"), ("{value: 2}", "-2")])
def test_weights_that_sum_to_zero_are_one_error(errors, weights):
    text = LINEAR
    for weight in weights:
        text = text.replace("{weight: 0.5}", f"{{weight: {weight}}}", 1)
    (error,) = errors(text)
    assert "merge.yaml:4:" in error
    assert "sum to zero" in error


def test_two_mistakes_are_two_errors(errors):
    assert len(errors(TIES.replace("weight: 1,", "weight: abc,").replace("0.8", "1.x"))) == 2
    assert len(errors(TIES.replace("weight: 1, density: 0.5", "density: abc"))) == 2
    assert len(errors(TIES.replace("weight: 1,", "weight: abc,") + "rules: [{where: {layers: 99}, keep: a}]\n")) == 2


def test_a_wrong_override_is_one_error(errors):
    (error,) = errors(TIES, "--set", "models.0.parameters.weight=abc")
    assert error.startswith("--set ")
