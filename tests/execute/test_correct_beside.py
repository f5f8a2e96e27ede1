"""Corrections in files beside a model: applied to a module or a folder they make the model that folding makes."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from execute.correct_models import (  # noqa: E402
    TACT,
    batches,
    facts,
    llamas,
    loaded,
    made,
    moments,
    planned,
    tensors,
)
from mergetool import apply_correction  # noqa: E402
from mergetool.errors import CheckpointError, OutputRefused, PlanError  # noqa: E402
from mergetool.execute.parts import finish, run_part  # noqa: E402
from mergetool.execute.run import run  # noqa: E402
from mergetool.execute.verify import verify  # noqa: E402
from mergetool.plan.parts import Share  # noqa: E402

__all__ = ["facts", "llamas"]  # fixtures

SIDE = TACT.replace("}", ", fold: side_file}")
HEAD = "correct: {method: tact, fold: head}\n"


@pytest.fixture
def merged(llamas, tmp_path, facts):
    """A merged model with a file for each task."""
    run(planned(llamas, SIDE), tmp_path / "merged")
    return tmp_path / "merged"


def test_the_model_beside_the_files_is_the_merge_as_it_is(llamas, merged, tmp_path):
    run(planned(llamas, ""), tmp_path / "plain")
    assert (merged / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (merged / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert sorted(path.name for path in (merged / "corrections").iterdir()) == [
        "first.safetensors",
        "second.safetensors",
    ]
    assert "apply_correction" in (merged / "README.md").read_text()
    assert verify(merged, sample=10).ok
    loaded(merged)


@pytest.mark.parametrize("task", ["first", "second"])
def test_a_folder_is_corrected_to_the_model_that_folding_makes(llamas, merged, tmp_path, task):
    run(planned(llamas, TACT), tmp_path / "folded")
    apply_correction(merged, merged / "corrections" / f"{task}.safetensors", tmp_path / "own")
    found, expected = tensors(tmp_path / "own"), tensors(tmp_path / "folded" / task)
    assert list(found) == list(expected)
    for name, tensor in expected.items():  # in float32 the merge was rounded once before
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "folded" / task / name).read_bytes()
    loaded(tmp_path / "own")


def test_a_module_is_corrected_where_it_is(llamas, merged, tmp_path):
    run(planned(llamas, TACT), tmp_path / "folded")
    model, expected = loaded(merged), loaded(tmp_path / "folded" / "first")
    apply_correction(model, merged / "corrections" / "first.safetensors")
    (batch, *_) = batches(planned(llamas, TACT), "first")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-4, atol=1e-5)


def test_parts_and_a_killed_run_leave_the_same_files(llamas, merged, tmp_path):
    plan = planned(llamas, SIDE)
    for part in (1, 2):
        run_part(plan, Share(part, 2), tmp_path / "parts")
    finish(plan, tmp_path / "parts")
    for name in ("corrections/first.safetensors", "corrections/second.safetensors", "provenance.json", "README.md"):
        assert (tmp_path / "parts" / name).read_bytes() == (merged / name).read_bytes()


def test_verify_finds_a_file_that_was_changed(merged):
    file = merged / "corrections" / "first.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert not verify(merged, sample=0).ok


def test_a_model_without_a_place_keeps_scales_alone(tmp_path, facts):
    folder = made(tmp_path / "models", "mistral")
    run(planned(folder, SIDE), tmp_path / "merged")
    held = load_file(tmp_path / "merged" / "corrections" / "first.safetensors")
    assert held
    assert all(name.endswith("weight:scale") for name in held)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Two classifiers whose heads have nothing to do with each other."""
    folder = made(tmp_path_factory.mktemp("heads") / "models", "bert_classifier")
    for seed, label in enumerate(("a", "b")):
        file = folder / label / "model.safetensors"
        changed = load_file(file)
        random = torch.Generator().manual_seed(seed)
        changed["classifier.weight"] = torch.randn(3, 16, generator=random)
        changed["classifier.bias"] = torch.randn(3, generator=random)
        save_file(changed, file, {"format": "pt"})
    return folder


def test_a_tasks_own_head_takes_up_the_correction_of_what_it_reads(classifiers, tmp_path, facts):
    plan = planned(classifiers, HEAD)
    run(plan, tmp_path / "merged")
    for task, label in (("first", "a"), ("second", "b")):
        kind = "AutoModelForSequenceClassification"
        body, expert = loaded(tmp_path / "merged", kind), loaded(classifiers / label, kind)
        data = batches(plan, task)
        had, wanted = (moments(each, "classifier", data, "input") for each in (body, expert))
        epsilon = wanted.std.mean() / (2 * 6)
        scale = np.clip((wanted.std + epsilon) / (had.std + epsilon), 0.1, 10)
        shift = wanted.mean - scale * had.mean

        model = loaded(tmp_path / "merged", kind)
        apply_correction(model, tmp_path / "merged" / "heads" / f"{task}.safetensors")

        for path in ("weight", "bias"):
            assert not torch.equal(model.classifier.get_parameter(path), expert.classifier.get_parameter(path))
        weight, bias = expert.classifier.weight.detach().double(), expert.classifier.bias.detach().double()
        expected = weight * torch.from_numpy(scale), bias + weight @ torch.from_numpy(shift)
        torch.testing.assert_close(model.classifier.weight.detach().double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.classifier.bias.detach().double(), expected[1], rtol=1e-4, atol=1e-5)
    assert "classifier.weight" in load_file(tmp_path / "merged" / "heads" / "first.safetensors")
    assert verify(tmp_path / "merged", sample=5).ok


# ----------------------------------------------------------------------------------------------------------- bad inputs


def test_a_model_without_a_head_of_its_own_is_refused_from_the_plan(classifiers, tmp_path):
    """Its body can be merged, and a rule says whose head the merged model has."""
    folder = shutil.copytree(classifiers, tmp_path / "models")
    file = folder / "b" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.startswith("classifier.")}, file, {"format": "pt"})
    with pytest.raises(PlanError) as caught:
        planned(folder, f"rules: [{{where: {{part: head.classifier}}, keep: a}}]\n{HEAD}")
    (problem,) = caught.value.problems
    assert problem.what == (
        "b has no `classifier.weight`, `classifier.bias`, where `fold: head` puts the correction of `second`"
    )
    line = (folder / "correct.yaml").read_text().splitlines().index("  - {model: b, data: second}") + 1
    assert re.fullmatch(rf"(.*/)?correct\.yaml:{line}:13", problem.where)


def test_a_file_that_holds_no_correction_is_refused(merged):
    with pytest.raises(CheckpointError, match="holds no correction"):
        apply_correction(merged, merged / "model.safetensors", merged.parent / "other")


def test_a_model_that_lacks_what_is_corrected_is_refused(merged, tmp_path):
    file = merged / "corrections" / "first.safetensors"
    with pytest.raises(PlanError, match=r"has no `model.layers.0"):
        apply_correction(torch.nn.Linear(2, 2), file)
    short = {n: t for n, t in tensors(merged).items() if ".2." not in n}
    (tmp_path / "short").mkdir()
    save_file(short, tmp_path / "short" / "model.safetensors")
    (tmp_path / "short" / "config.json").write_text((merged / "config.json").read_text())
    with pytest.raises(PlanError, match=r"has no `model.layers.2"):
        apply_correction(tmp_path / "short", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_size_is_refused(merged):
    model = loaded(merged)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(5, 16))
    with pytest.raises(PlanError, match=r"is \[5, 16\], and its correction is of \[24\] units"):
        apply_correction(model, merged / "corrections" / "first.safetensors")


def test_a_new_folder_must_be_named_and_new(merged, tmp_path):
    file = merged / "corrections" / "first.safetensors"
    with pytest.raises(ValueError, match="name the new folder"):
        apply_correction(merged, file)
    with pytest.raises(ValueError, match="no output"):
        apply_correction(loaded(merged), file, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputRefused, match="exists already"):
        apply_correction(merged, file, tmp_path / "there")


def test_an_output_that_is_a_model_holds_no_models_of_tasks(llamas, merged):
    with pytest.raises(OutputRefused, match="is a merged model, and would hold a model of each task"):
        run(planned(llamas, TACT), merged, force=True)
    assert json.loads((merged / "provenance.json").read_text())["files"]
