"""Shuffled twins are turned back while they are read; fine-tunes stay; what cannot be aligned is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from anatomy.symmetric import made, random_permutations, turned
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from execute.test_calibration import make_tokenizer
from mergetool.cli.group import mergetool
from mergetool.errors import CheckpointError, NonFinite, PlanError, RunError
from mergetool.execute import align_check
from mergetool.execute.align import KIND, alignment
from mergetool.execute.devices import backend_for
from mergetool.execute.job import work
from mergetool.execute.outlet import Memory
from mergetool.execute.run import run
from mergetool.execute.sources import fetched, open_sources
from mergetool.plan import build
from mergetool.recipe import load

LINEAR = """\
merge_method: linear
models: [{model: first}, {model: second}]
parameters: {weight: 0.5}
align: {reference: first, %s}
"""
TIES = """\
merge_method: ties
base_model: base
models: [{model: first}, {model: second}]
parameters: {weight: 1, density: 1}
"""
BY_WEIGHTS = "method: weight_matching"
BY_ACTIVATIONS = "method: activation_matching"
DATA = "calibration: {data: {words: {path: words.txt, samples: 12, max_length: 24}}}\n"
ADAPTER = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def network(config):
    return LlamaForCausalLM(LlamaConfig.from_dict(config))


def read(path, samples, seed):
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 256, (4, 16), generator=random)} for _ in range(samples)]
"""
MODELS = ["llama", "gpt2", "mixtral", "gpt_oss"]
LINES = "the quick brown fox jumps over the lazy dog and runs away from all of them, {} times or {} times. "


def save(folder: Path, tensors, config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored(folder: Path):
    return load_file(folder / "model.safetensors")


def noisy(tensors, scale, seed=5):
    random = np.random.default_rng(seed)
    return {n: (w + scale * random.normal(size=w.shape)).astype(w.dtype) for n, w in tensors.items()}


def twin(folder: Path, name: str, noise: float = 0.0):
    """A model ``first`` and its shuffled twin ``second``; the model."""
    model = made(name)
    groups = model.groups()
    shuffled = turned(noisy(model.tensors, noise), groups, random_permutations(groups, seed=3))
    save(folder / "first", model.tensors, model.config)
    save(folder / "second", shuffled, model.config)
    return model


def planned(folder: Path, text: str):
    (folder / "recipe.yaml").write_text(text)
    return build(load(folder / "recipe.yaml"))


def merged(plan, turnings):
    """Every tensor that the plan's jobs make."""
    found = {}
    backend = backend_for("cpu")
    with open_sources(fetched(plan, turnings), turnings) as sources:
        for job in plan.jobs:
            result = Memory(job.bytes_written)
            work(plan, job, sources, backend, {}, result)
            found[job.name] = result.raw.view(job.dtype.storage).reshape(job.shape)
    return found


def words(folder: Path) -> None:
    make_tokenizer().save_pretrained(folder / "first")
    numbers = np.random.default_rng(0).integers(0, 10**6, (60, 2))
    (folder / "words.txt").write_text("".join(LINES.format(*pair) for pair in numbers))


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_a_shuffled_twin_merged_with_its_original_is_the_original(tmp_path, name):
    model = twin(tmp_path, name)
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    turnings = alignment(plan, root=tmp_path / "facts")
    assert_same(merged(plan, turnings), model.tensors)
    assert "not checked" not in "".join(turnings.notes)
    assert any(abs(merged(plan, {})[n] - values).max() > 1e-2 for n, values in model.tensors.items())


@pytest.mark.parametrize("score", ["correlation", "inner_product"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_activations_find_the_same(tmp_path, name, score):
    model = twin(tmp_path, name)
    words(tmp_path)
    # Heads of random weights that share their values put out nearly the same, and differ by less than the margin.
    plan = planned(tmp_path, DATA + LINEAR % f"{BY_ACTIVATIONS}, score: {score}, margin: 0")
    found = alignment(plan, root=tmp_path / "facts")
    assert_same(merged(plan, found), model.tensors)
    assert all(match.found == pytest.approx(1, abs=1e-5) for match in found.sources[1].matches)


@pytest.mark.parametrize("how", [BY_WEIGHTS, BY_ACTIVATIONS])
def test_any_device_finds_the_same_and_each_keeps_its_own(tmp_path, how):
    model = twin(tmp_path, "llama")
    words(tmp_path)
    plan = planned(tmp_path, DATA + LINEAR % how)
    for device in ("cpu", "cpu:0,cpu:0", "torch:cpu"):
        assert_same(merged(plan, alignment(plan, device=device, root=tmp_path / "facts")), model.tensors)
    assert len(list((tmp_path / "facts").iterdir())) == 1  # all of them are the CPU


def test_another_score_is_matched_anew(tmp_path):
    twin(tmp_path, "llama")
    words(tmp_path)
    matches = []
    for score in ("correlation", "inner_product"):
        plan = planned(tmp_path, DATA + LINEAR % f"{BY_ACTIVATIONS}, groups: [mlp], score: {score}")
        matches.append([match.identity for match in alignment(plan, root=tmp_path / "facts").sources[1].matches])
    assert len(list((tmp_path / "facts").iterdir())) == 2
    assert matches[0] != matches[1]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_the_bytes_do_not_depend_on_the_tile(tmp_path, name):
    twin(tmp_path, name, noise=0.01)
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    turnings = alignment(plan, root=tmp_path / "facts")
    whole = merged(plan, turnings)
    for tile in (40, 1000):
        small = replace(plan, memory=replace(plan.memory, tile=tile, resident=0))
        assert {n: v.tobytes() for n, v in merged(small, turnings).items()} == {
            n: v.tobytes() for n, v in whole.items()
        }


def test_other_data_is_matched_anew(tmp_path):
    twin(tmp_path, "llama")
    words(tmp_path)
    plan = planned(tmp_path, DATA + LINEAR % BY_ACTIVATIONS)
    alignment(plan, root=tmp_path / "facts")
    (tmp_path / "words.txt").write_text("something else is said here over and over again, " * 60)
    alignment(plan, root=tmp_path / "facts")
    assert len(list((tmp_path / "facts").iterdir())) == 2


def test_an_adapter_is_run_only_where_it_is_trusted(tmp_path):
    model = twin(tmp_path, "llama")
    words(tmp_path)
    (tmp_path / "adapter.py").write_text(ADAPTER)
    text = DATA.replace("{data:", "{adapter: adapter.py, data:")
    for method in (BY_WEIGHTS, BY_ACTIVATIONS):
        plan = planned(tmp_path, text + LINEAR % method)
        with pytest.raises(PlanError, match="--trust-code"):
            alignment(plan, root=tmp_path / "facts")
        found = alignment(plan, trust_code=True, root=tmp_path / "facts")
        assert_same(merged(plan, found), model.tensors)
        assert "not checked" not in "".join(found.notes)


def test_gains_are_told_by_kind(tmp_path):
    twin(tmp_path, "llama")
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    found = alignment(plan, root=tmp_path / "facts")
    assert list(found) == [1]
    (aligned,) = found.sources.values()
    mlp = [match for match in aligned.matches if match.group.endswith("mlp")]
    assert all(match.found == pytest.approx(1, abs=1e-5) and match.identity < 0.5 for match in mlp)
    assert [note.split(" turned:")[0] for note in found.notes] == ["second: mlp", "second: heads", "second: vo"]
    assert "→ 1.000 of a perfect match" in found.notes[0]


def test_what_was_found_is_kept_and_read_again(tmp_path, monkeypatch):
    twin(tmp_path, "llama")
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    once = alignment(plan, root=tmp_path / "facts")
    (kept,) = (tmp_path / "facts").iterdir()
    assert kept.name.startswith(f"{KIND}-")
    assert [path.name for path in sorted(kept.iterdir())] == ["0000.safetensors", "facts.json"]

    def matched(*args):
        pytest.fail("it was matched already")

    with monkeypatch.context() as patch:
        patch.setattr("mergetool.execute.align._matched", matched)
        again = alignment(plan, root=tmp_path / "facts")
    assert again.notes == once.notes
    assert_same(merged(plan, again), merged(plan, once), 0)

    alignment(planned(tmp_path, LINEAR % f"{BY_WEIGHTS}, margin: 0.02"), root=tmp_path / "facts")
    assert len(list((tmp_path / "facts").iterdir())) == 2


def test_a_fine_tune_stays_as_it_is(tmp_path):
    model = made("llama")
    save(tmp_path / "first", model.tensors, model.config)
    save(tmp_path / "second", noisy(model.tensors, 0.005), model.config)
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    found = alignment(plan, root=tmp_path / "facts")
    assert found.notes == ("second: faces the reference already, nothing is turned",)
    assert {n: v.tobytes() for n, v in merged(plan, found).items()} == {
        n: v.tobytes() for n, v in merged(plan, {}).items()
    }


def test_experts_are_found_in_other_files(tmp_path):
    model = twin(tmp_path, "mixtral")
    tensors = stored(tmp_path / "second")
    (tmp_path / "second" / "model.safetensors").unlink()
    files = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    where = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: w for n, w in tensors.items() if where[n] == file}, tmp_path / "second" / file, {"format": "pt"})
    about = {"metadata": {"total_size": sum(w.nbytes for w in tensors.values())}, "weight_map": where}
    (tmp_path / "second" / "model.safetensors.index.json").write_text(json.dumps(about))

    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    turnings = alignment(plan, root=tmp_path / "facts")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    one = replace(plan, jobs=(plan.job(name),))
    np.testing.assert_allclose(merged(one, turnings)[name], model.tensors[name], rtol=0, atol=1e-6)


def test_experts_that_are_stored_otherwise_do_not_change_places(tmp_path):
    twin(tmp_path, "mixtral")
    path = tmp_path / "second" / "model.safetensors"
    tensors = load_file(path)
    odd = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    save_file({**tensors, odd: tensors[odd].astype(np.float64)}, path, {"format": "pt"})
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    turnings = alignment(plan, root=tmp_path / "facts")
    with pytest.raises(CheckpointError, match="takes the place of"):
        fetched(plan, turnings)


def test_deltas_are_taken_in_the_order_of_the_base(tmp_path):
    model = twin(tmp_path, "llama", noise=0.01)
    save(tmp_path / "base", model.tensors, model.config)
    plan = planned(tmp_path, f"{TIES}align: {{{BY_WEIGHTS}}}\n")
    found = alignment(plan, root=tmp_path / "facts")
    assert [bool(each.moved) for each in found.sources.values()] == [False, True]

    plan = planned(tmp_path, f"{TIES}align: {{{BY_WEIGHTS}, reference: second}}\n")
    with pytest.raises(PlanError, match=r"`ties` takes deltas from base[\s\S]*set `align.reference: base`"):
        alignment(plan, root=tmp_path / "facts")


def test_another_reference_serves_fine_tunes_of_one_base(tmp_path):
    model = made("llama")
    for i, name in enumerate(("base", "first", "second")):
        save(tmp_path / name, noisy(model.tensors, 0.005 * i, i), model.config)
    plan = planned(tmp_path, f"{TIES}align: {{{BY_WEIGHTS}, reference: second}}\n")
    found = alignment(plan, root=tmp_path / "facts")
    assert sorted(found) == [0, 1]
    assert not any(each.moved for each in found.sources.values())


def test_models_of_another_layout_are_refused(tmp_path):
    model = twin(tmp_path, "llama")
    config = {**model.config, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    (tmp_path / "second" / "config.json").write_text(json.dumps(config))
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    with pytest.raises(PlanError, match=r"second: its units are laid out otherwise than those of first: .*heads"):
        alignment(plan, root=tmp_path / "facts")


def test_models_whose_symmetries_are_unknown_are_refused_by_name(tmp_path):
    model = made("deepseek_experts")
    for name in ("first", "second"):
        save(tmp_path / name, model.tensors, model.config)
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    with pytest.raises(PlanError, match=r"first: .*symmetries are unknown"):
        alignment(plan, root=tmp_path / "facts")


def test_a_model_without_such_units_is_refused(tmp_path):
    twin(tmp_path, "llama")
    plan = planned(tmp_path, LINEAR % f"{BY_WEIGHTS}, groups: [experts]")
    with pytest.raises(PlanError, match="nothing of experts that could change places"):
        alignment(plan, root=tmp_path / "facts")


def test_what_is_not_finite_is_named_and_nothing_is_kept(tmp_path):
    model = made("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = {**model.tensors, name: model.tensors[name].copy()}
    broken[name][3, 3] = np.nan
    save(tmp_path / "first", model.tensors, model.config)
    save(tmp_path / "second", broken, model.config)
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    with pytest.raises(NonFinite, match=f"second: {name}"):
        alignment(plan, root=tmp_path / "facts")
    assert not [path for path in (tmp_path / "facts").iterdir() if path.is_dir()]


def test_a_turn_that_changes_the_function_is_refused(tmp_path, monkeypatch):
    twin(tmp_path, "llama")
    true = align_check.verify

    def spoiled(outputs, get, turning, **how):
        return true(outputs, get, _Half(turning), **how)

    class _Half:
        """Turns all but the values."""

        def __init__(self, turning):
            self._turning = turning

        def source(self, name):
            return self._turning.source(name)

        def of(self, name, shape):
            found = self._turning.of(name, shape)
            return replace(found, indices={}) if "v_proj" in name else found

    monkeypatch.setattr(align_check, "verify", spoiled)
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    with pytest.raises(RunError, match="second: the turned model is another function"):
        alignment(plan, root=tmp_path / "facts")
    assert alignment(planned(tmp_path, LINEAR % f"{BY_WEIGHTS}, verify: false"), root=tmp_path / "facts")


@pytest.mark.parametrize("groups", ["[residual]", "[mlp, heads, vo, experts, residual]"])
def test_a_turned_residual_stream_is_checked_too(tmp_path, groups):
    model = made("llama")
    every = model.groups(("mlp", "heads", "vo", "experts", "residual"))
    chosen = [group for group in every if group.kind in groups]
    save(tmp_path / "first", model.tensors, model.config)
    save(tmp_path / "second", turned(model.tensors, every, random_permutations(chosen, 3)), model.config)
    plan = planned(tmp_path, LINEAR % f"{BY_WEIGHTS}, groups: {groups}")
    assert_same(merged(plan, alignment(plan, root=tmp_path / "facts")), model.tensors)


def test_what_transformers_does_not_know_is_aligned_and_said_not_to_be_checked(tmp_path):
    model = twin(tmp_path, "llama")
    for name in ("first", "second"):
        save(tmp_path / name, stored(tmp_path / name), {**model.config, "model_type": "llama_of_mine"})
    plan = planned(tmp_path, LINEAR % BY_WEIGHTS)
    found = alignment(plan, root=tmp_path / "facts")
    assert "was not checked" in found.notes[-1]
    assert_same(merged(plan, found), model.tensors)


def test_what_an_adapter_had_a_part_in_is_verified_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("mergetool.execute.fact_making.cache_folder", lambda kind: tmp_path / "facts")
    twin(tmp_path, "llama")
    words(tmp_path)
    (tmp_path / "adapter.py").write_text(ADAPTER)
    text = DATA.replace("{data:", "{adapter: adapter.py, data:") + LINEAR % BY_ACTIVATIONS
    run(planned(tmp_path, text), tmp_path / "merged", trust_code=True)

    def sources(*flags):
        result = CliRunner().invoke(mergetool, ["verify", str(tmp_path / "merged"), *flags])
        assert result.exit_code == 0
        return " ".join(result.output.partition("sources")[2].split())

    assert sources().startswith("the recipe's adapter adapter.py is code; read it, and add --trust-code")
    assert "8 of 30 tensors made again, the same bytes" in sources("--trust-code")
    (tmp_path / "words.txt").write_text("something else")
    assert sources("--trust-code").startswith("not the data that it was made with: words")
