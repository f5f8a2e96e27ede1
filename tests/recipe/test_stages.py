"""Data, and the stages around the merge: what they mean, and what is said where they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergetool.recipe import load, read, schema
from mergetool.recipe.calibrated import on_hub
from mergetool.recipe.data import Align, Calibration, Correct, Data, Evaluate, Report, Train

from .full import STAGES

HEAD = """\
merge_method: linear
models:
  - {model: a, data: math}
  - model: b
parameters: {weight: 1}
"""
DATA = "calibration: {data: {math: math.jsonl, code: {path: code.txt}}}\n"
NO_DATA = "add `calibration: {data: {NAME: FILE}}`"


def told(text: str, overrides=()):
    return [(p.where.removeprefix("<text>:"), p.what, p.fix) for p in read(text, overrides)[1]]


def test_every_key_has_its_meaning():
    recipe = load(STAGES)
    assert recipe.calibration == Calibration(
        data=(
            Data("mixed", "mixed.jsonl"),
            Data("python", "python.txt", samples=64, max_length=256),
            Data("talk", "hub:org/talk@v1:train", column="dialogue"),
        ),
        adapter="adapter.py",
    )
    assert recipe.align == Align(
        "activation_matching", "org/base", ("mlp", "heads"), ("mixed",), 50, "inner_product", 0.02, seed=3, verify=False
    )
    assert recipe.correct == Correct("tact", "output", "mean_std", 5.0, ("python", "talk"), 32, "head")
    assert recipe.train == Train(100, 1e-3, "linear", 0.1, 2.0, 4096, 50, 0.1, 10, 4, 5)
    assert recipe.evaluate == Evaluate(("python", "mixed"), "accuracy", "float32")
    assert [source.data for source in recipe.models] == ["python", "talk"]


def test_defaults_are_those_of_the_dataclasses_and_seeds_the_recipes():
    more = "seed: 9\nalign: {method: weight_matching}\ncorrect: {method: repair}\ntrain: {}\nevaluate: {}\n"
    recipe = load(HEAD + DATA + more)
    assert recipe.align == Align("weight_matching", seed=9)
    assert recipe.correct == Correct("repair", "all")
    assert recipe.train == Train(seed=9)
    assert recipe.evaluate == Evaluate()
    assert recipe.calibration.data == (Data("code", "code.txt"), Data("math", "math.jsonl"))


def test_a_report_says_what_it_shows_or_that_there_is_none():
    more = HEAD + DATA + "report: "
    assert load(HEAD + DATA).report is None
    assert load(more + "none\n").report == Report(draw=False)
    assert load(more + "{}\n").report == Report()
    assert load(more + "{cka: true, data: [code, math, code], samples: 3}\n").report == Report(
        cka=True, data=("code", "math"), samples=3
    )
    assert load(more + "none\n").canonical()["report"]["draw"] is False
    assert "report" not in load(HEAD + DATA).canonical()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEAD + DATA + "report: nome\n", ("7:9", "`report` must be one of none", "did you mean `none`?")),
        (HEAD + DATA + "report: {kca: true}\n", ("7:10", "unknown key `kca`", "did you mean `cka`?")),
        (HEAD + DATA + "report: {cka: 3}\n", ("7:15", "`cka` must be true or false", "")),
        (
            HEAD + DATA + "report: {data: xyz}\n",
            ("7:16", "there are no calibration data `xyz`", "allowed here: `math`, `code`"),
        ),
        (HEAD + DATA + "report: {samples: 0}\n", ("7:19", "`samples` must be at least 1, not 0", "")),
        (
            HEAD.replace(", data: math", "") + "report: {cka: true}\n",
            ("6:10", "`cka` runs the models on data, and the recipe has no `calibration`", NO_DATA),
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n" + DATA + "report: {cka: true}\n",
            ("5:10", "`cka` compares models, and here is one", "remove it"),
        ),
    ],
)
def test_what_is_wrong_with_a_report_is_told_where_it_is(text, problem):
    assert told(text) == [problem]


def test_the_scope_that_nobody_names_is_that_of_each_paper():
    own = HEAD + DATA
    assert load(own + "correct: {method: repair}\n").correct.scope == "all"
    assert load(own + "correct: {method: tact}\n").correct.scope == "output"
    assert load(own + "correct: {method: repair, scope: output}\n").correct.scope == "output"


def test_stages_may_be_switched_off():
    off = load(STAGES, ["align.method=none", "correct.method=none", "train=null", "evaluate=null"])
    assert (off.align, off.correct, off.train, off.evaluate) == (None, None, None, None)
    assert set(off.canonical()) == set(load(HEAD + DATA).canonical())


def test_a_recipe_without_them_means_what_it_did():
    canonical = load(HEAD.replace(", data: math", "")).canonical()
    assert canonical["models"] == [{"reference": "a", "parameters": {}}, {"reference": "b", "parameters": {}}]
    assert not {"calibration", "align", "correct", "train", "evaluate"} & set(canonical)


def test_what_they_mean_is_part_of_what_the_recipe_means():
    canonical = load(STAGES).canonical()
    assert json.loads(json.dumps(canonical)) == canonical
    assert canonical["models"][0]["data"] == "python"
    assert canonical["calibration"]["data"][1] == {
        "name": "python",
        "path": "python.txt",
        "samples": 64,
        "max_length": 256,
        "column": None,
    }
    for change in (
        "calibration.data.mixed=other.jsonl",
        "align.margin=0",
        "correct.clamp=2",
        "train.topk=1",
        "evaluate.metric=loss",
    ):
        assert load(STAGES, [change]).canonical() != canonical
    order = STAGES.replace("    mixed: mixed.jsonl\n", "").replace("  data:\n", "  data:\n    mixed: mixed.jsonl\n")
    assert load(order).canonical() == canonical


def test_whose_data_and_which_reference():
    recipe = load(HEAD + DATA + "align: {method: weight_matching, reference: b}\n")
    assert [data.name for data in recipe.data_of("a")] == ["math"]
    assert [data.name for data in recipe.data_of("b")] == ["code", "math"]
    assert [data.name for data in recipe.calibration.named(("math", "code"))] == ["math", "code"]
    assert recipe.reference == "b"
    assert load(HEAD, ["models.0.data=null"]).reference == "a"
    assert load(STAGES, ["align.reference=null"]).reference == "org/base"
    assert load(HEAD, ["models.0.data=null"]).data_of("a") == ()


def test_files_are_found_from_the_recipe():
    assert Data("x", "a/b.txt").file(Path("/home")) == Path("/home/a/b.txt")
    assert Data("x", "/a.txt").file(Path("/home")) == Path("/a.txt")
    assert Data("x", "b.txt").file(None) == Path("b.txt")
    assert Data("x", "hub:a/b:train").file(None) is None
    assert Calibration((), "adapter.py").adapter_file(Path("/home")) == Path("/home/adapter.py")
    assert Calibration(()).adapter_file(Path("/home")) is None
    paths = ("a.TXT", "a.jsonl", "a.parquet", "hub:a:b", "a.npz", "folder")
    assert [Data("x", path).format for path in paths] == ["text", "jsonl", "parquet", "hub", None, None]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("hub:org/name:train", ("org/name", None, None, "train")),
        ("hub:name:train[:100]", ("name", None, None, "train[:100]")),
        ("hub:org/name@v1.0:test", ("org/name", "v1.0", None, "test")),
        ("hub:org/name@refs/pr/1:en-raw:train+test", ("org/name", "refs/pr/1", "en-raw", "train+test")),
        ("hub:org/name", None),
        ("hub::train", None),
        ("hub:a/b/c:train", None),
    ],
)
def test_data_sets_on_the_hub(path, parts):
    found = on_hub(path)
    assert (found and (found["repo"], found["revision"], found["config"], found["split"])) == parts


@pytest.mark.parametrize(
    ("line", "where", "what", "fix"),
    [
        ("align: weight_matching", "7:8", "`align` must be a mapping of names to values", ""),
        ("align: {}", "7:8", "`method` is missing in `align`", "add `method: …`"),
        (
            "align: {method: weight_maching}",
            "7:17",
            "`method` must be one of weight_matching, activation_matching, none",
            "did you mean `weight_matching`?",
        ),
        (
            "align: {method: weight_matching, reference: c}",
            "7:45",
            "`c` is not a model of this recipe",
            "allowed here: `a`, `b`",
        ),
        (
            "align: {method: weight_matching, groups: [mlp, head]}",
            "7:42",
            "`groups` must be some of mlp, heads, vo, experts, residual, units",
            "did you mean `heads`?",
        ),
        (
            "align: {method: weight_matching, groups: []}",
            "7:42",
            "`groups` must be a list of some of mlp, heads, vo, experts, residual, units",
            "",
        ),
        (
            "align: {method: weight_matching, data: mats}",
            "7:40",
            "there are no calibration data `mats`",
            "did you mean `math`?",
        ),
        (
            "align: {method: activation_matching, data: [code, zzz]}",
            "7:51",
            "there are no calibration data `zzz`",
            "allowed here: `math`, `code`",
        ),
        (
            "align: {method: activation_matching, data: []}",
            "7:44",
            "`data` must be the name of calibration data, or a list of names",
            "",
        ),
        ("align: {method: weight_matching, max_sweeps: 0}", "7:46", "`max_sweeps` must be at least 1, not 0", ""),
        (
            "align: {method: activation_matching, score: inner_products}",
            "7:45",
            "`score` must be one of correlation, inner_product",
            "did you mean `inner_product`?",
        ),
        (
            "align: {method: weight_matching, score: inner_product}",
            "7:34",
            "`score` is about activations, and `weight_matching` compares weights",
            "remove it, or use `method: activation_matching`",
        ),
        ("align: {method: weight_matching, margin: -1}", "7:42", "`margin` must be at least 0, not -1", ""),
        ("align: {method: weight_matching, margin: .nan}", "7:42", "`margin` must be a finite number, not nan", ""),
        ("align: {method: weight_matching, verify: 1}", "7:42", "`verify` must be true or false", ""),
        ("align: {method: weight_matching, seed: -1}", "7:40", "`seed` must not be negative", ""),
        (
            "correct: {method: repare}",
            "7:19",
            "`method` must be one of repair, tact, none",
            "did you mean `repair`?",
        ),
        ("correct: {method: repair, clamp: 0.5}", "7:34", "`clamp` must be at least 1, not 0.5", ""),
        ("correct: {method: repair, samples: 1.5}", "7:36", "`samples` must be a whole number", ""),
        (
            "correct: {method: repair, fold: head}",
            "7:27",
            "`fold` is about the tasks of `tact`; `repair` makes one correction, in the model",
            "remove it",
        ),
        (
            "correct: {method: tact, scope: all, fold: head}",
            "7:43",
            "`fold: head` has room for a correction of the output only",
            "use `scope: output`, or another `fold`",
        ),
        (
            "correct: {method: tact, data: [math, code]}",
            "7:38",
            "`tact` corrects each task towards its own model, and no model has `data: code`",
            "add `data: code` to a model, or remove it here",
        ),
        ("train: {learning_rate: 0}", "7:24", "`learning_rate` must be above 0, not 0", ""),
        ("train: {learning_rate: fast}", "7:24", "`learning_rate` must be a number", "write one such as `0.5`"),
        ("train: {held_out: 1}", "7:19", "`held_out` must be at least 0 and below 1, not 1", ""),
        ("train: {patience: true}", "7:19", "`patience` must be a whole number", ""),
        ("train: {steps: 99999999999999999999}", "7:16", "`steps` must be below 2⁶³", ""),
        (
            "train: {schedule: cosin}",
            "7:19",
            "`schedule` must be one of constant, linear, cosine",
            "did you mean `cosine`?",
        ),
        (
            "evaluate: {metric: acuracy}",
            "7:20",
            "`metric` must be one of loss, accuracy",
            "did you mean `accuracy`?",
        ),
        (
            "evaluate: {dtype: bfloat}",
            "7:19",
            "`dtype` must be one of float16, bfloat16, float32, float64",
            "did you mean `bfloat16`?",
        ),
        ("evaluate: {data: [code, mth]}", "7:25", "there are no calibration data `mth`", "did you mean `math`?"),
        ("train: {momentum: 1}", "7:9", "unknown key `momentum`", None),
        (
            "rules:\n  - {where: {part: norm}, models: [{model: b, data: math}]}",
            "8:47",
            "unknown key `data`",
            "allowed here: `model`, `parameters`",
        ),
    ],
)
def test_one_line_more(line, where, what, fix):
    ((found, said, advice),) = told(HEAD + DATA + line + "\n")
    assert (found, said) == (where, what)
    assert fix is None or advice == fix


@pytest.mark.parametrize(
    ("data", "where", "what", "fix"),
    [
        ("calibration: {}", "6:14", "`data` is missing in `calibration`", "add `data: …`"),
        ("calibration: {data: {}}", "6:21", "`data` must not be empty", ""),
        ("calibration: {data: math.txt}", "6:21", "`data` must be a mapping of names to values", ""),
        ("calibration: {data: {math: 3}}", "6:28", "`math` must be text", ""),
        ("calibration: {data: {math: {samples: 3}}}", "6:28", "`path` is missing in `math`", "add `path: …`"),
        (
            "calibration: {data: {math: {path: m.txt, sample: 3}}}",
            "6:42",
            "unknown key `sample`",
            "did you mean `samples`?",
        ),
        (
            "calibration: {data: {math: {path: m.txt, max_length: 1}}}",
            "6:54",
            "`max_length` must be at least 2, not 1",
            "",
        ),
        (
            "calibration: {data: {math: m.csv}}",
            "6:28",
            "there is no reader for `m.csv`, by how its name ends",
            "use one of .txt, .jsonl, .parquet, or read it with an `adapter` of your own",
        ),
        (
            "calibration: {data: {math: 'hub:org/math'}}",
            "6:28",
            "`hub:org/math` names no data set on the Hub",
            "write `hub:org/name:split`; a revision and a configuration may stand between: `@revision:config:`",
        ),
        (
            "calibration: {data: {math: m.txt, ../x: x.txt}}",
            "6:35",
            "`../x` is no name for data",
            "use letters, digits, `_`, `-` and `.`: files are called by it",
        ),
        (
            "",
            "3:22",
            "`math` is to be the name of calibration data, and the recipe has no `calibration`",
            "add `calibration: {data: {math: FILE}}`",
        ),
    ],
)
def test_data_that_are_wrong(data, where, what, fix):
    assert told(f"{HEAD}{data}\n") == [(where, what, fix)]


def test_an_adapter_reads_what_nothing_else_does():
    assert told(HEAD + "calibration: {data: {math: digits.npz}, adapter: adapter.py}\n") == []


def test_a_misspelt_name_is_told_in_both_places():
    assert told(HEAD + DATA.replace("{math", "{maths")) == [
        ("3:22", "there are no calibration data `math`", "did you mean `maths`?"),
        ("6:22", "nothing refers to the data `maths`, but something to `math`", "did you mean `math`?"),
    ]
    mended, _ = read(HEAD + DATA.replace("{math", "{maths"))
    assert mended.models[0].data == "maths"


@pytest.mark.parametrize(
    ("line", "where", "method"),
    [
        ("align: {method: activation_matching}", "6:17", "activation_matching"),
        ("correct: {method: tact}", "6:19", "tact"),
        ("correct: {method: repair}", "6:19", "repair"),
    ],
)
def test_who_needs_data_says_so(line, where, method):
    text = HEAD.replace(", data: math", "") + line + "\n"
    assert told(text) == [(where, f"`{method}` runs the models on data, and the recipe has no `calibration`", NO_DATA)]


def test_matching_weights_needs_no_data_and_any_number_of_models():
    text = HEAD.replace(", data: math", "").replace("  - model: b\n", "  - model: b\n  - model: c\n")
    assert told(text + "align: {method: weight_matching, reference: c}\n") == []


def test_aligning_needs_two_models():
    text = "merge_method: passthrough\nmodels: [{model: a}]\nalign: {method: weight_matching}\n"
    assert told(text) == [("3:1", "`align` turns models to face each other, and here is one", "remove it")]
    assert told(text + "base_model: z\n") == []


def test_tact_knows_whose_each_task_is():
    text = HEAD + DATA + "correct: {method: tact}\n"
    assert told(text) == []
    shared = "`tact` corrects towards one model for each task, and `math` is the `data` of 2"
    own = "give each model data of its own"
    assert told(text.replace("- model: b", "- {model: b, data: math}")) == [("4:22", shared, own)]
    nobody = "`tact` corrects each task towards its own model, and no model has `data` of its own"
    fix = "add `data: NAME` to the models, or use `method: repair`"
    assert told(text.replace(", data: math", "")) == [("7:19", nobody, fix)]


def test_the_schema_of_editors_knows_them():
    found = schema()
    entries = found["$defs"]
    assert {"calibration", "align", "correct", "train", "evaluate"} <= set(found["properties"])
    assert entries["AlignEntry"]["properties"]["method"]["enum"][:2] == ["weight_matching", "activation_matching"]
    assert entries["DataEntry"]["properties"]["samples"]["default"] == 128
    assert entries["TrainEntry"]["properties"]["learning_rate"]["exclusiveMinimum"] == 0
    assert "data" not in entries["RuleSourceEntry"]["properties"]
    assert all(entries[name]["additionalProperties"] is False for name in ("CalibrationEntry", "CorrectEntry"))
