"""A merged model in memory is the one that is written: every tensor the same, and it runs."""

import pytest
import torch
from safetensors.torch import load_file

from mergetool.execute.forward.model import open_model
from mergetool.execute.merged import merged_weights
from mergetool.execute.prepare import prepare
from mergetool.execute.run import run
from mergetool.plan import build
from mergetool.recipe import load

METHODS = {
    "linear": "parameters: {weight: 0.5}",
    "ties": "parameters: {weight: 0.5, density: 0.5, scope: model}",
    "slerp": "parameters: {t: 0.3}",
}


def planned(tiny_models, tmp_path, method, more="", **options):
    base, first, second = (tiny_models[name] for name in ("base", "first", "second"))
    head = f"base_model: {first if method == 'slerp' else base}\n" if method != "linear" else ""
    listed = f"models:\n  - model: {first}\n  - model: {second}\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: {method}\n{head}{listed}{METHODS[method]}\n{more}")
    return build(load(path), **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_is_what_a_run_writes(tiny_models, tmp_path, method, dtype):
    plan = planned(tiny_models, tmp_path, method, f"dtype: {dtype}\n")
    run(plan, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")

    with merged_weights(plan) as weights:
        assert weights.shapes == {name: tuple(tensor.shape) for name, tensor in written.items()}
        for name, tensor in written.items():
            found = weights.get(name)
            assert found.dtype == torch.float32
            assert torch.equal(found, tensor.float())


def test_a_merged_model_runs_and_predicts_what_the_written_one_does(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    plan = planned(tiny_models, tmp_path, "linear", "dtype: bfloat16\n")
    run(plan, tmp_path / "out")
    tokens = torch.arange(24).reshape(2, 12)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()

    with merged_weights(plan, prepare(plan)) as weights:
        model = open_model(plan.sources[plan.lender].checkpoint.config, weights, "the merged model")
        model.load(model.groups)
        with torch.no_grad():
            found = model.module(input_ids=tokens).logits
            expected = written(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_wide_tensor_is_made_by_all_workers(tiny_models, tmp_path, monkeypatch):
    from mergetool.plan import work

    monkeypatch.setattr(work, "WIDE", 0)
    plan = planned(tiny_models, tmp_path, "ties", workers=3)
    with merged_weights(plan) as weights:
        shared = {name: weights.get(name) for name in weights.shapes}
    monkeypatch.undo()
    with merged_weights(plan) as weights:
        assert all(torch.equal(weights.get(name), tensor) for name, tensor in shared.items())
