"""Changes from outside the file: what they set, where their mistakes are, what text remains."""

from __future__ import annotations

import pytest

from mergetool.errors import RecipeError
from mergetool.recipe import load, read

TEXT = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n  - model: b\nparameters:\n  weight: 1\n"


def test_values_are_yaml():
    recipe = load(
        TEXT,
        [
            "models.0.parameters.weight=0.3",
            "parameters.density=[0.1, 0.9]",
            "parameters.normalize=false",
            "models.1.model=c",
            "seed=3",
            "parameters.lambda={filter: mlp, value: 1e-1}",
        ],
    )
    values = recipe.parameters_for(recipe.method(), "mlp", 0.5, ["a", "c"]).values
    assert values["weight"] == (0.3, 1.0)
    assert values["density"] == pytest.approx((0.5, 0.5))
    assert values["normalize"] is False
    assert values["lambda"] == 0.1
    assert recipe.seed == 3
    assert recipe.sources == ("base", "a", "c")


def test_the_text_is_the_recipe_as_run():
    assert load(TEXT).text == TEXT
    changed = load(TEXT, ["models.0.parameters.weight=0.3", "dtype=float16"])
    assert load(changed.text).canonical() == changed.canonical()
    assert changed.canonical() != load(TEXT).canonical()


def test_an_empty_value_unsets():
    assert load(TEXT + "dtype: float16\n", ["dtype="]).dtype is None


def test_places():
    recipe = load(TEXT, ["models.0.parameters.weight=0.3"])
    assert recipe.where("models", 0, "parameters", "weight") == "--set models.0.parameters.weight=0.3"
    assert recipe.where("models", 0, "model") == "<text>:4:12"
    assert recipe.where("parameters", "weight") == "<text>:7:11"


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ("seed", "an override must be a dotted path, `=` and a value", None),
        ("=3", "an override must be a dotted path, `=` and a value", None),
        ("a..b=3", "an override must be a dotted path, `=` and a value", None),
        ("models.2.model=c", "`models` has no entry `2`", "its entries are numbered 0 to 1"),
        ("models.-1.model=c", "`models` has no entry `-1`", "its entries are numbered 0 to 1"),
        ("models.a=c", "`models` has no entry `a`", "its entries are numbered 0 to 1"),
        ("base_model.path=c", "`base_model` is a single value, so it has no `path`", "leave out what follows"),
        ("sede=3", "unknown key `sede`", "did you mean `seed`?"),
        ("parameters.wieght=3", "`ties` has no parameter `wieght`", None),
        ("seed=[", "not valid YAML", None),
        ("seed=a: b: c", "not valid YAML", None),
        ("seed=x", "`seed` must be a whole number", ""),
        ("parameters.density=2", "`density` must be from 0 to 1, not 2", ""),
    ],
)
def test_mistakes(change, what, fix):
    with pytest.raises(RecipeError) as caught:
        load(TEXT, [change])
    (problem,) = caught.value.problems
    assert problem.where == f"--set {change}"
    assert problem.what.startswith(what)
    assert fix is None or problem.fix == fix


def test_mistakes_come_with_those_of_the_file():
    _, problems = read(TEXT + "sede: 3\n", ["models.9.model=c", "seed=x"])
    assert [problem.where for problem in problems] == ["--set models.9.model=c", "--set seed=x", "<text>:8:1"]
