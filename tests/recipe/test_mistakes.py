"""Each kind of mistake: its sentence, its line and column, and what to do."""

from __future__ import annotations

import pytest

from mergetool.errors import RecipeError
from mergetool.methods import METHODS
from mergetool.recipe import load, read

HEAD = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n  - model: b\nparameters:\n  weight: 1\n"
DECIMAL = "write it in decimal digits, or quote a text"
RESCALE = METHODS["ties"].parameters["rescale"].description
NOT_YET = "is a mergekit key that mergetool does not support yet"


def told(text: str, overrides=()):
    return [(p.where.removeprefix("<text>:"), p.what, p.fix) for p in read(text, overrides)[1]]


@pytest.mark.parametrize(
    ("line", "where", "what", "fix"),
    [
        ("seed: -1", "8:7", "`seed` must not be negative", ""),
        ("seed: 1.5", "8:7", "`seed` must be a whole number", ""),
        ("seed: true", "8:7", "`seed` must be a whole number", ""),
        ("seed: 18446744073709551616", "8:7", "`seed` must be below 2⁶⁴", ""),
        ("output: 3", "8:9", "`output` must be text", ""),
        ('output: ""', "8:9", "`output` must not be empty", ""),
        (
            "dtype: bf16",
            "8:8",
            "`dtype` must be one of float16, bfloat16, float32, float64",
            "did you mean `bfloat16`?",
        ),
        ("tokenizer_source: bas", "8:19", "`bas` is not a model of this recipe", "did you mean `base`?"),
        (
            "tokenizer_source: union",
            "8:19",
            "`tokenizer_source: union` is not supported yet",
            "use `base` or one of the models; all models must then have its vocabulary",
        ),
        ("rules: 3", "8:8", "`rules` must be a list", ""),
        ("rules:\n  - 3", "9:5", "entry 1 of `rules` must be a mapping of names to values", ""),
        ("rules:\n  - drop: true", "9:5", "`where` is missing in entry 1 of `rules`", "add `where: …`"),
        (
            "rules:\n  - where: {}\n    drop: true",
            "9:12",
            "`where` must have at least one of `part`, `layers` and `name`",
            "",
        ),
        (
            "rules:\n  - where: {part: norm}",
            "9:5",
            "entry 1 of `rules` must say one thing to do: "
            "either `merge_method`, `parameters` or `models`, or `keep`, or `drop: true`",
            "",
        ),
        (
            "rules:\n  - where: {part: norm}\n    drop: false",
            "10:11",
            "`drop` must be true",
            "remove the rule to keep the tensors",
        ),
        (
            "rules:\n  - where: {layers: 1-x}\n    drop: true",
            "9:21",
            "`layers` must be a number, a range like `0-11` or a list of these",
            "",
        ),
        ("rules:\n  - where: {layers: 5-2}\n    drop: true", "9:21", "`layers` runs backwards: `5-2`", "write `2-5`"),
        ("rules:\n  - where: {layers: []}\n    drop: true", "9:21", "`layers` must name at least one layer", ""),
        ("rules:\n  - where: {name: 3}\n    drop: true", "9:19", "`name` must be text or a list of texts", ""),
        (
            "rules:\n  - where: {part: [norm, atention.q]}\n    drop: true",
            "9:26",
            "unknown part `atention.q`",
            "did you mean `attention.q`?",
        ),
        (
            "rules:\n  - where: {part: norm}\n    keep: c",
            "10:11",
            "`c` is not a model of this recipe",
            "allowed here: `a`, `b`, `base`",
        ),
        (
            "rules:\n  - where: {part: norm}\n    merge_method: liner\n    parameters: {weight: 1}",
            "10:19",
            "unknown method `liner`",
            "did you mean `linear`?",
        ),
        (
            "rules:\n  - where: {part: norm}\n    merge_method: linear\n    parameters: {density: 1}",
            "11:18",
            "`linear` has no parameter `density`",
            "allowed here: `weight`, `normalize`",
        ),
        (
            "rules:\n  - where: {part: norm}\n    merge_method: slerp\n    parameters: {t: 1}",
            "3:1",
            "`slerp` merges exactly 1 model besides the base, and here are 2",
            "remove models, or choose another method",
        ),
        (
            "rules:\n  - where: {part: norm}\n    models: [{model: base, parameters: {weight: 1}}]",
            "10:22",
            "`base` is not a model of this recipe",
            "allowed here: `a`, `b`",
        ),
        (
            "rules:\n  - where: {part: norm}\n    models: [{model: a, parameters: {lambda: 1}}]",
            "10:38",
            "`lambda` is one value per tensor and cannot differ between models",
            "move it to the rule's `parameters`",
        ),
        (
            "slices: []",
            "8:1",
            f"`slices` {NOT_YET}",
            "where its ranges cover all layers, list the models under `models` instead",
        ),
        ("seed: 010", "8:7", "`010` is one number in YAML 1.1 and another in YAML 1.2", DECIMAL),
        ("  lambda: 1:30", "8:11", "`1:30` is one number in YAML 1.1 and another in YAML 1.2", DECIMAL),
        ("  lambda: -017", "8:11", "`-017` is one number in YAML 1.1 and another in YAML 1.2", DECIMAL),
        ("  rescale: true", "8:12", "`rescale` must be false, not true", RESCALE),
        (
            "chat_template: auto",
            "8:1",
            f"`chat_template` {NOT_YET}",
            "remove it",
        ),
        ("normalize: true", "8:1", "`normalize` is a parameter", "put it under `parameters`"),
        ("  density: [0.1, 1.5]", "8:18", "entry 2 of `density` must be from 0 to 1, not 1.5", ""),
        (
            "  density:\n    - {filter: a, value: 1.5}\n    - value: 1",
            "9:26",
            "`density` must be from 0 to 1, not 1.5",
            "",
        ),
        ("  density: .nan", "8:12", "`density` must be a finite number, not nan", ""),
        ("  density: []", "8:12", "`density` must not be empty", ""),
        (
            "  density:",
            "8:3",
            "`density` has no value",
            "write one after the colon, or remove the key",
        ),
        ("  density: [[1]]", "8:13", "entry 1 of `density` must be a number, true, false or text, not a list", ""),
        (
            "  density: {value: {value: 1}}",
            "8:20",
            "`value` must be a number, true, false or text, not a mapping",
            "",
        ),
        ("  density: {filter: 3, value: 1}", "8:21", "`filter` must be text", ""),
        ("  density: {filter: a}", "8:12", "`value` is missing in `density`", "add `value: …`"),
        ("  density: [{value: 1}, 2]", "8:25", "entry 2 of `density` must be a mapping of names to values", ""),
        ("  lambda: big", "8:11", "`lambda` must be a number, not 'big'", "write a number, such as `lambda: 0.5`"),
        ("  normalize: 1", "8:14", "`normalize` must be true or false, not 1", ""),
        (
            "  scope: modle",
            "8:10",
            "`scope` must be one of tensor, model, not 'modle'; did you mean model?",
            "",
        ),
    ],
)
def test_one_line_more(line, where, what, fix):
    assert told(HEAD + line + "\n") == [(where, what, fix)]


@pytest.mark.parametrize(
    ("old", "new", "where", "what", "fix"),
    [
        ("merge_method: ties\n", "", "1:1", "`merge_method` is missing", "add `merge_method: …`"),
        ("ties", "tise", "1:15", "unknown method `tise`", "did you mean `ties`?"),
        ("ties", "3", "1:15", "`merge_method` must be text", ""),
        ("base_model: base\n", "", "1:15", "`ties` needs a base", "add `base_model: …`"),
        ("model: b\n", "model: a\n", "5:12", "`a` is among the models twice", "keep one; the first is at <text>:4:12"),
        ("model: b\n", "model:\n", "5:5", "`model` must be text", ""),
        ("model: b\n", "model: {path: b, model: c}\n", "5:12", "`model` must have one of `model` and `path`", ""),
        (
            "model: b\n",
            "model: {model: {path: b}, override_architecture: x}\n",
            "5:31",
            f"`override_architecture` {NOT_YET}",
            "remove it",
        ),
        ("model: b\n", "{}\n", "5:5", "`model` is missing in entry 2 of `models`", "add `model: …`"),
        ("model: b\n", "b\n", "5:5", "entry 2 of `models` must be a mapping of names to values", ""),
        (
            "  weight: 1\n",
            "  density: 1\n",
            "1:15",
            "`ties` needs `weight`",
            "set it for each of the `models`, or for all under `parameters`",
        ),
        (
            "a\n  - model: b\nparameters:\n  weight: 1\n",
            "a\n    parameters: {weight: 1}\n  - model: b\n",
            "6:5",
            "`ties` needs `weight`, which is not set for this model",
            "add `weight: …` under its `parameters`",
        ),
        (
            "model: b\n",
            "model: b\n    parameters: {normalize: false}\n",
            "6:18",
            "`normalize` is one value per tensor and cannot differ between models",
            "move it to the recipe's `parameters`",
        ),
        ("model: b\n", "model: b\n    weight: 1\n", "6:5", "`weight` is a parameter", "put it under `parameters`"),
        (
            "weight: 1\n",
            "weight: 0\nmerge_method: linear\n",
            "8:1",
            "`merge_method` is set twice in the same mapping",
            "keep one; the first is at <text>:1:1",
        ),
    ],
)
def test_one_change(old, new, where, what, fix):
    assert old in HEAD
    assert told(HEAD.replace(old, new, 1)) == [(where, what, fix)]


def test_parameters_of_a_base_among_the_models_are_no_mistake_unless_they_are_misspelled():
    text = HEAD.replace("model: b\n", "model: base\n    parameters: {%s: 1}\n")
    assert told(text % "weight") == []
    ((where, _, fix),) = told(text % "wieght")
    assert (where, fix) == ("6:18", "did you mean `weight`?")


@pytest.mark.parametrize("value", ["0", "7", "0.5", "-1", "1e-3", "0.010"])
def test_numbers_that_all_yaml_reads_alike(value):
    assert told(f"{HEAD}  lambda: {value}\n") == []


def test_a_method_that_is_unknown_and_models_that_are_missing_are_both_told():
    assert told("merge_method: linaer\n") == [
        ("1:1", "`models` is missing", "add `models: …`"),
        ("1:15", "unknown method `linaer`", "did you mean `linear`?"),
    ]


def test_rescale_without_effect_is_taken():
    assert told(HEAD + "  rescale: false\n") == []
    for value in ("false", "true"):
        assert told(HEAD.replace("ties", "task_arithmetic") + f"  rescale: {value}\n") == []


def test_a_single_override_may_be_a_text():
    assert load(HEAD, "seed=3").seed == 3
    assert told(HEAD, "seed=x") == [("--set seed=x", "`seed` must be a whole number", "")]


def test_models_missing():
    assert told("merge_method: linear\n") == [("1:1", "`models` is missing", "add `models: …`")]
    assert told("merge_method: linear\nmodels: []\n") == [("2:9", "`models` must not be empty", "")]
    _, *rest = told("merge_method: slerp\nslices: []\nbase_model: a\n")
    assert rest == []


def test_constant_weights_that_sum_to_zero():
    text = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
    text += "  - model: b\n    parameters: {weight: -1}\n"
    ((where, what, _),) = told(text)
    assert where == "4:26"
    assert what == "the weights sum to zero, so they cannot be normalised"
    assert told(text + "parameters: {normalize: false}\n") == []
    assert told(text.replace("weight: -1", "weight: [-1, 1]")) == []


def test_weights_of_a_rule_that_sum_to_zero():
    rule = "rules:\n  - where: {part: norm}\n    merge_method: linear\n    parameters: {weight: 0}\n"
    ((where, what, _),) = told(HEAD + rule)
    assert where == "11:26"
    assert "sum to zero" in what


def test_a_rule_with_a_method_of_its_own_needs_its_parameters():
    text = HEAD.replace("ties", "passthrough").replace("  - model: b\n", "").replace("weight", "scale")
    rule = "  - where: {part: norm}\n    merge_method: linear\n"
    assert told(f"{text}rules:\n{rule}    parameters: {{weight: 1}}\n{rule}") == [
        (
            "12:19",
            "`linear` needs `weight`",
            "set it for each of the `models`, or for all under `parameters`",
        )
    ]


def test_all_at_once_and_in_order():
    text = HEAD.replace("weight", "wieght").replace("model: b", "model: a") + "dtype: fp16\nseeed: x\nseed: -3\n"
    assert [where for where, _, _ in told(text)] == ["5:12", "7:3", "8:8", "9:1", "10:7"]


def test_very_many_problems_are_cut_short():
    problems = told(HEAD + "".join(f"k{i}: 1\n" for i in range(500)))
    assert len(problems) == 101
    assert problems[-1][1] == "there are more problems than these"


@pytest.mark.parametrize("text", ["3\n", "- a\n", "a b\nc", "[]\n"])
def test_not_a_mapping(text):
    ((where, what, fix),) = told(text)
    assert (where, what) == ("1:1", "a recipe must be a mapping of names to values")
    assert fix == "begin with `merge_method: …`"


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n...\n", "~\n"])
def test_empty(text):
    assert told(text) == [("1:1", "the recipe is empty", "begin with `merge_method: …`")]


def test_load_raises_what_read_returns():
    text = HEAD + "seed: -1\n"
    with pytest.raises(RecipeError) as caught:
        load(text)
    assert list(caught.value.problems) == read(text)[1]
    assert "pydantic" not in str(caught.value)


def test_read_mends_what_it_can():
    recipe, problems = read(HEAD.replace("weight", "wieght").replace("ties", "tis") + "foo: 1\nseed: x\n")
    assert len(problems) == 4
    assert recipe is not None
    assert recipe.merge_method == "ties"
    assert recipe.parameters["weight"][0].value == 1
