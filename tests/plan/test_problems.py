"""Everything that is wrong is said at once, with its place in the recipe and what to do."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from mergetool.errors import (
    CheckpointError,
    MergetoolError,
    MissingTensor,
    PlanError,
    RecipeError,
    ShapeMismatch,
)
from mergetool.plan import build, check
from mergetool.recipe import load
from plan.models import TIES, llama, planned, save, trio

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return trio(tmp_path)


def problems(kind, call):
    """The problems of an error of exactly this class."""
    with pytest.raises(MergetoolError) as raised:
        call()
    assert type(raised.value) is kind, raised.value
    return raised.value.problems


def place(text, words):
    """The ``line:column`` at which words stand in a text."""
    before = text[: text.index(words)]
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def of(found, words):
    """The one problem whose text holds these words."""
    matching = [problem for problem in found if words in problem.what]
    assert len(matching) == 1, found
    return matching[0]


ALL_AT_ONCE = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1, densty: 0.5}
  - model: b
    parameters:
      weight:
        - filter: self_atn
          value: 0.3
        - value: 1
  - model: missing
    parameters: {weight: 1}
parameters:
  density: 0.5
"""


def test_a_typo_a_filter_a_missing_tensor_a_shape_and_a_missing_model_are_told_at_once(folder):
    tensors = llama(1)
    del tensors["model.norm.weight"]
    save(folder / "a", tensors)
    save(folder / "b", llama(2) | {Q: ("BF16", np.zeros((8, 7), np.uint16))})
    path = folder / "merge.yaml"
    path.write_text(ALL_AT_ONCE)
    found = problems(RecipeError, lambda: check(path))
    assert len(found) == 5

    typo = of(found, "densty")
    assert typo.where == f"{path}:{place(ALL_AT_ONCE, 'densty')}"
    assert "density" in typo.fix + typo.what
    assert of(found, "filter").where == f"{path}:{place(ALL_AT_ONCE, 'self_atn')}"
    assert of(found, "`model.norm.weight`").where == f"{path}:{place(ALL_AT_ONCE, 'a' + chr(10))}"
    shape = of(found, f"`{Q}`")
    assert shape.where == f"{path}:{place(ALL_AT_ONCE, 'b' + chr(10) + '    parameters:')}"
    assert "[8, 8] in base" in shape.what
    assert "[8, 7] in b" in shape.what
    absent = next(problem for problem in found if place(ALL_AT_ONCE, "missing") in problem.where)
    assert absent.where.startswith(f"{path}:{place(ALL_AT_ONCE, 'missing')}")
    assert RecipeError.exit_code == 2


def test_every_model_that_is_missing_is_told(folder):
    for name in ("a", "b"):
        shutil.rmtree(folder / name)
    found = problems(CheckpointError, lambda: planned(folder))
    assert [re.search(r"merge\.yaml:(\d+):(\d+)", problem.where).groups() for problem in found] == [
        ("4", "12"),
        ("6", "12"),
    ]


def test_a_missing_base_is_told_at_its_place(folder):
    shutil.rmtree(folder / "base")
    (problem,) = problems(CheckpointError, lambda: planned(folder))
    assert "merge.yaml:2:13" in problem.where


def test_a_rule_about_a_model_that_is_missing_is_no_further_problem(folder):
    shutil.rmtree(folder / "b")
    text = TIES + "rules: [{where: {part: norm}, keep: b}, {where: {name: only.in.b}, drop: true}]\n"
    (problem,) = problems(CheckpointError, lambda: planned(folder, text))
    assert "merge.yaml:6:12" in problem.where


def test_the_tensors_that_a_source_lacks_are_one_problem(folder):
    tensors = {name: tensor for name, tensor in llama(1).items() if ".1." not in name}
    save(folder / "a", tensors, num_hidden_layers=2)
    (problem,) = problems(MissingTensor, lambda: planned(folder))
    assert problem.what.startswith("a lacks ")
    assert problem.what.count("`") == 2 * 3
    assert "merge.yaml:4:12" in problem.where
    assert "keep" in problem.fix
    assert MissingTensor.exit_code == 3


def test_a_tensor_that_only_one_source_has_is_missing_in_the_others(folder):
    save(folder / "b", llama(2) | {"extra.weight": ("BF16", np.zeros(3, np.uint16))})
    found = problems(MissingTensor, lambda: planned(folder))
    assert [problem.what.split()[0] for problem in found] == ["base", "a"]
    text = TIES + "rules: [{where: {name: extra.weight}, drop: true}]\n"
    assert "extra.weight" not in {job.name for job in planned(folder, text).jobs}
    text = TIES + "rules: [{where: {name: extra.weight}, keep: b}]\n"
    assert planned(folder, text).job("extra.weight").method == "passthrough"


def test_vocabularies_that_differ_are_named_as_such(folder):
    save(folder / "b", llama(2, vocabulary=25))
    found = problems(ShapeMismatch, lambda: planned(folder))
    assert len(found) == 2
    for problem in found:
        assert "[24, 8] in base, [24, 8] in a, [25, 8] in b" in problem.what
        assert "vocabularies differ" in problem.fix
        assert "merge.yaml:6:12" in problem.where
    assert ShapeMismatch.exit_code == 3


def test_transposed_shapes_of_equal_size_are_not_merged(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    save(folder / "a", llama(1) | {name: ("BF16", np.zeros((16, 8), np.uint16))})
    (problem,) = problems(ShapeMismatch, lambda: planned(folder))
    assert "[8, 16] in base, [16, 8] in a, [8, 16] in b" in problem.what


def test_a_tensor_that_holds_numbers_in_one_source_only_is_refused(folder):
    save(folder / "a", llama(1) | {Q: ("I32", np.zeros((8, 8), np.int32))})
    (problem,) = problems(PlanError, lambda: planned(folder))
    assert f"`{Q}` is I32 in a" in problem.what
    assert "merge.yaml:4:12" in problem.where


@pytest.mark.parametrize("density", ["[0.1, 0.9]", "[{filter: mlp, value: 0.1}, {value: 0.5}]"])
def test_the_density_of_a_whole_model_cannot_vary_inside_it(folder, density):
    text = TIES.replace("density: 0.5", f"scope: model\n  density: {density}")
    (problem,) = problems(RecipeError, lambda: planned(folder, text))
    assert "scope: model" in problem.what
    assert f"merge.yaml:{place(text, density)}" in problem.where
    planned(folder, text.replace("scope: model", "scope: tensor"))


def test_a_density_for_each_source_is_no_variation(folder):
    text = TIES.replace("weight: 1}", "weight: 1, density: 0.1}") + "  scope: model\n"
    assert planned(folder, text).jobs[0].parameters["density"] == (0.1, 0.5)


def test_keeping_what_the_source_does_not_have_is_told(folder):
    save(folder / "b", llama(2) | {"extra.weight": ("BF16", np.zeros(3, np.uint16))})
    text = TIES + "rules:\n  - where: {name: extra.weight}\n    keep: a\n"
    (problem,) = problems(RecipeError, lambda: planned(folder, text))
    assert "`extra.weight` of a, which has no such tensor" in problem.what
    assert "merge.yaml:12:11" in problem.where


@pytest.mark.parametrize("where", ["{part: router}", "{layers: 7}", "{name: model.layer.*}"])
def test_a_rule_that_matches_nothing_is_told(folder, where):
    text = f"{TIES}rules:\n  - where: {where}\n    keep: a\n"
    (problem,) = problems(RecipeError, lambda: planned(folder, text))
    assert "matches no tensor" in problem.what
    assert "merge.yaml:11:12" in problem.where


def test_a_rule_behind_one_that_takes_all_its_tensors_is_told(folder):
    text = (
        f"{TIES}rules:\n  - {{where: {{part: norm}}, keep: a}}\n  - {{where: {{name: model.norm.weight}}, keep: b}}\n"
    )
    (problem,) = problems(RecipeError, lambda: planned(folder, text))
    assert "merge.yaml:12:" in problem.where


def test_a_filter_that_matches_nothing_is_told_wherever_it_stands(folder):
    text = TIES.replace("density: 0.5", "density: [{filter: mlpp, value: 0.1}, {value: 1}]")
    text += "rules: [{where: {part: norm}, parameters: {lambda: [{filter: nrm, value: 2}, {value: 1}]}}]\n"
    found = problems(RecipeError, lambda: planned(folder, text))
    assert [problem.where.split("merge.yaml:")[1] for problem in found] == [place(text, "mlpp"), place(text, "nrm")]


def test_a_parameter_that_some_tensors_do_not_get_is_told(folder):
    text = TIES.replace("weight: 1}", "weight: {filter: mlp, value: 1}}")
    found = problems(RecipeError, lambda: planned(folder, text))
    assert all("`ties` needs `weight`" in problem.what for problem in found)
    assert all("of a" in problem.what for problem in found)
    assert "mlp" not in "".join(problem.what for problem in found)


def test_weights_that_sum_to_zero_somewhere_in_a_gradient_are_told(folder):
    text = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
    text += "  - {model: b, parameters: {weight: [0, -1]}}\n"
    found = problems(RecipeError, lambda: planned(folder, text))
    assert any("zero" in problem.what and "merge.yaml:3:" in problem.where for problem in found)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_a_dtype_that_cannot_be_written_asks_for_another(tmp_path, dtype):
    trio(tmp_path, dtype)
    found = problems(PlanError, lambda: planned(tmp_path))
    assert all("out_dtype" in problem.fix for problem in found)
    assert {job.dtype.name for job in planned(tmp_path, f"out_dtype: bfloat16\n{TIES}").jobs} == {"BF16"}


def test_a_merge_of_which_nothing_is_left_is_refused(folder):
    text = TIES + 'rules: [{where: {name: "*"}, drop: true}]\n'
    (problem,) = problems(RecipeError, lambda: planned(folder, text))
    assert "nothing is left" in problem.what


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_told_before_anything_is_read(folder, size):
    path = folder / "a" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    (problem,) = problems_of_checkpoint(folder)
    assert "truncated" in problem.what
    assert str(path) in problem.where
    assert "merge.yaml:4:12" in problem.where
    assert "download" in problem.fix


def problems_of_checkpoint(folder):
    with pytest.raises(CheckpointError) as raised:
        planned(folder)
    assert raised.value.exit_code == 3
    return raised.value.problems


def test_a_recipe_without_mistakes_plans_the_same_by_either_way(folder):
    assert planned(folder).digest == check(folder / "merge.yaml").digest
    assert check(folder / "merge.yaml", ["parameters.density=0.25"]).jobs[0].parameters["density"] == (0.25, 0.25)


def test_an_override_that_is_wrong_is_told_by_its_own_text(folder):
    planned(folder)
    (problem,) = problems(RecipeError, lambda: check(folder / "merge.yaml", ["parameters.density=2"]))
    assert "--set parameters.density=2" in problem.where


def test_models_of_mixed_dtypes_take_the_bases(folder):
    save(folder / "a", llama(1, "F32"))
    save(folder / "b", llama(2, "F16"))
    plan = planned(folder)
    assert {job.dtype.name for job in plan.jobs} == {"BF16"}
    assert [read.tensor.dtype.name for read in plan.jobs[0].reads] == ["BF16", "F32", "F16"]


def test_recipes_from_text_plan_with_absolute_paths(folder):
    text = TIES
    for name in ("base", "a", "b"):
        text = re.sub(rf"(model: ){name}\b", rf"\g<1>{folder / name}", text)
    assert len(build(load(text)).jobs) == len(llama(0))
