"""Everything that is wrong is said at once, with its place in the recipe and what to do."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from mergetool.errors import (
    CheckpointError,
    MergetoolError,
    MissingTensor,
    OutputRefused,
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
    (problem,) = problems(ShapeMismatch, lambda: planned(folder))
    assert "`model.embed_tokens.weight`, `lm_head.weight`" in problem.what
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
    assert problem.what == f"I32 only in a: `{Q}`"
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
    assert problem.what == "rule 1 keeps of a what it does not have: `extra.weight`"
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
    (problem,) = problems(RecipeError, lambda: planned(folder, text))
    assert problem.what.startswith("`ties` needs `weight` for a, which nothing sets (for `model.embed_tokens.weight`, ")
    assert problem.what.endswith(" and 2 more)")
    assert "mlp" not in problem.what


def test_models_of_another_size_are_one_problem_with_the_first_shapes(folder):
    save(folder / "b", llama(2, hidden=16))
    (problem,) = problems(ShapeMismatch, lambda: planned(folder))
    assert problem.what.count("`") == 2 * 6  # five names, and whose shapes they are
    assert "vocabularies" not in problem.fix
    assert problem.what.endswith("[24, 8] in base, [24, 8] in a, [24, 16] in b (of `model.embed_tokens.weight`)")


def test_models_of_other_architectures_are_told_as_such(folder):
    tensors = {f"transformer.{name}": tensor for name, tensor in llama(2).items()}
    save(folder / "b", tensors, config={"model_type": "gpt2"})
    (problem,) = problems(PlanError, lambda: planned(folder))
    assert problem.what == "llama (base, a) and gpt2 (b) are different architectures"
    assert "merge.yaml:6:12" in problem.where
    assert "lacks" in problem.fix


def test_model_types_with_the_same_tensors_are_only_noted(folder):
    save(folder / "b", llama(2), config={"model_type": "mistral", "num_hidden_layers": 2})
    assert any("llama, mistral" in note for note in planned(folder).notes)


def test_parameters_of_a_base_among_the_models_are_ignored_and_noted(folder):
    text = TIES.replace("models:\n", "models:\n  - {model: base, parameters: {weight: 3, density: 1}}\n")
    plan = planned(folder, text)
    assert plan.jobs[0].parameters == planned(folder).jobs[0].parameters
    (note,) = [note for note in plan.notes if "base" in note]
    assert "no effect (`weight`, `density`)" in note
    linear = "merge_method: linear\nbase_model: base\nmodels: [{model: base, parameters: {weight: 1}}, "
    assert planned(folder, linear + "{model: a, parameters: {weight: 1}}]\n").notes == ()


@pytest.mark.parametrize("output", ["a", "a/merged", "."])
def test_an_output_among_the_sources_is_told_by_check_and_build(folder, output):
    path = folder / "merge.yaml"
    path.write_text(f"output: {output}\n{TIES}")
    for call in (lambda: check(path), lambda: planned(folder, output=str(folder / output))):
        (problem,) = problems(OutputRefused, call)
        assert "is where the source" in problem.what


def test_an_output_that_is_a_file_or_a_link_is_told(folder):
    (folder / "file").touch()
    (folder / "link").symlink_to(folder / "elsewhere")
    for name, what in (("file", "is no folder"), ("link", "is a link")):
        (problem,) = problems(OutputRefused, lambda name=name: planned(folder, output=folder / name))
        assert what in problem.what
        assert problem.where == str(folder / name)
    assert planned(folder, output=str(folder / "new")).output == folder / "new"


@pytest.mark.parametrize("thing", ["merge.yaml", b"x", 3, None])
def test_building_what_was_not_loaded_says_so(thing):
    (problem,) = problems(RecipeError, lambda: build(thing))
    assert "takes a recipe that was loaded" in problem.what
    assert "load" in problem.fix


def test_building_a_plan_says_so(folder):
    (problem,) = problems(RecipeError, lambda: build(planned(folder)))
    assert "not a plan" in problem.what


@pytest.mark.parametrize("workers", [0, -1])
def test_there_is_at_least_one_worker(folder, workers):
    (problem,) = problems(PlanError, lambda: planned(folder, workers=workers))
    assert problem.where == "--workers"


# Tokenizers


def tokenizer(folder, *tokens, **more):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [], **more})
    (folder / "tokenizer.json").write_text(text)


@pytest.mark.parametrize("named", ["b", "base"])
def test_a_tokenizer_source_without_a_tokenizer_is_told(folder, named):
    text = f"tokenizer_source: {named}\n{TIES}"
    (problem,) = problems(PlanError, lambda: planned(folder, text))
    assert problem.what == f"{named} has no tokenizer files"
    assert "merge.yaml:1:19" in problem.where
    assert "remove the key" in problem.fix
    tokenizer(folder / "a", "x")
    (problem,) = problems(PlanError, lambda: planned(folder, text))
    assert problem.fix == "name a"
    tokenizer(folder / named, "x")
    assert planned(folder, text).tokenizer == ("base", "a", "b").index(named)


def test_tokenizers_that_number_tokens_differently_are_noted(folder):
    tokenizer(folder / "base", "x", "y")
    tokenizer(folder / "a", "x", "y", version="2.0")
    assert planned(folder).notes == ()
    tokenizer(folder / "b", "y", "x")
    (note,) = planned(folder).notes
    assert "base and b number their tokens differently (tokenizer.json)" in note


def test_vocabularies_that_cannot_be_taken_apart_are_compared_by_their_bytes(folder):
    for name in ("base", "a"):
        (folder / name / "tokenizer.model").write_bytes(b"same")
    (folder / "b" / "tokenizer.json").write_text("{}")
    assert planned(folder).notes == ()
    (folder / "a" / "tokenizer.model").write_bytes(b"other")
    (note,) = planned(folder).notes
    assert "(tokenizer.model)" in note


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
