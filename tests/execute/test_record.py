"""Facts that are recorded are right, complete, found again, and continued after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from execute.forward.tiny import batches, opened, save
from mergetool.checkpoint.checkpoint import open_checkpoint
from mergetool.checkpoint.identity import identity
from mergetool.errors import CheckpointError, NonFinite, PlanError
from mergetool.execute.fact_folder import open_facts
from mergetool.execute.forward.passes import CannotStream, streamed
from mergetool.execute.forward.tally import Tally
from mergetool.execute.forward.watch import Watch
from mergetool.execute.record import record, record_pair
from mergetool.facts.statistics import GRAM

DOWN = "model.layers.1.mlp.down_proj.weight"


def measured(folder, root, statistics=("gram",), data=None, adapter=None, name="llama", **options):
    with opened(folder, adapter) as model:
        return record(model, data or batches(name), list(statistics), made_of={"model": 1}, root=root, **options)


def inputs_of(original, path, data):
    """What goes into a module of transformers' own model, real tokens only, in float64."""
    rows = []
    owner = original.get_submodule(path)
    handle = owner.register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    for batch in data:
        with torch.no_grad():
            original(**batch)
        rows[-1] = rows[-1][batch["attention_mask"].bool()]
    handle.remove()
    return torch.cat(rows).numpy().astype(np.float64)


@pytest.mark.parametrize("stream", [True, False])
def test_gram_is_the_naive_one_of_real_tokens(stream, tmp_path):
    original = save("llama", tmp_path / "m")
    data = batches("llama")
    facts = measured(tmp_path / "m", tmp_path, stream=stream)
    for layer in range(3):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            path = f"model.layers.{layer}.{name}"
            x = inputs_of(original, path, data)
            found = facts.get(f"{path}.weight", "gram")
            np.testing.assert_allclose(found, x.T @ x, rtol=1e-5, atol=1e-5 * (x.T @ x).max())
            assert float(facts.get(f"{path}.weight", "count")) == len(x) == 26
    assert {name for name in facts.names if "norm" not in name} == set(facts.names)
    assert "model.embed_tokens.weight" not in facts.names


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "mixtral", "mixtral_fused", "olmoe"])
def test_every_matrix_has_its_gram_and_moments(name, tmp_path):
    save(name, tmp_path / "m")
    both = [
        measured(tmp_path / "m", tmp_path / str(stream), ("gram", "moments"), name=name, stream=stream)
        for stream in (True, False)
    ]
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "m" / "model.safetensors").items()}
    assert both[0].entries.keys() == both[1].entries.keys()
    for key in both[0].entries:
        tensor, _, field = key.rpartition(":")
        first, second = (facts.get(tensor, field) for facts in both)
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5 * max(np.abs(second).max(), 1e-3))
    matrices = [
        k for k, shape in shapes.items() if len(shape) >= 2 and not any(w in k for w in ("emb", "wte", "wpe", "cls"))
    ]
    for tensor in matrices:
        channels = both[0].get(tensor, "gram").shape[-1]
        assert channels in (shapes[tensor][-1], shapes[tensor][-2], np.prod(shapes[tensor][1:]))


def test_facts_of_experts_in_one_tensor_are_stacked(tmp_path):
    save("mixtral", tmp_path / "apart")
    save("mixtral_fused", tmp_path / "fused")
    apart = measured(tmp_path / "apart", tmp_path / "1", ("gram", "moments"), name="mixtral")
    fused = measured(tmp_path / "fused", tmp_path / "2", ("gram", "moments"), name="mixtral")
    stack = fused.get("model.layers.1.mlp.experts.gate_up_proj", "gram")
    means = fused.get("model.layers.1.mlp.experts.gate_up_proj", "mean")
    counts = fused.get("model.layers.1.mlp.experts.gate_up_proj", "count")
    assert stack.shape == (4, 16, 16)
    assert counts.sum() == 2 * 26  # two experts a token
    for expert in range(4):
        prefix = f"model.layers.1.block_sparse_moe.experts.{expert}"
        for name, part in (("w1", slice(24)), ("w3", slice(24, 48))):
            np.testing.assert_allclose(apart.get(f"{prefix}.{name}.weight", "gram"), stack[expert], rtol=1e-5)
            np.testing.assert_allclose(apart.get(f"{prefix}.{name}.weight", "mean"), means[expert][part], rtol=1e-5)


def test_an_expert_without_tokens_has_facts_of_nothing(tmp_path):
    save("mixtral", tmp_path / "m")
    token = [{"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}]
    facts = measured(tmp_path / "m", tmp_path, data=token)
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight" for i in range(4)]
    assert sorted(float(facts.get(name, "count")) for name in names) == [0, 0, 1, 1]
    assert all(facts.get(name, "gram").shape == (24, 24) for name in names)


def test_moments_are_those_of_what_comes_out(tmp_path):
    original = save("llama", tmp_path / "m")
    facts = measured(tmp_path / "m", tmp_path, ("moments",), names=[DOWN, "model.layers.1", "model.norm.weight"])
    x = inputs_of(original, "model.layers.1.mlp.down_proj", batches("llama"))
    y = x @ original.model.layers[1].mlp.down_proj.weight.detach().numpy().astype(np.float64).T
    np.testing.assert_allclose(facts.get(DOWN, "mean"), y.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(facts.get(DOWN, "std"), y.std(0), rtol=1e-4)
    state = inputs_of(original, "model.layers.2.input_layernorm", batches("llama"))
    np.testing.assert_allclose(facts.get("model.layers.1", "mean"), state.mean(0), rtol=1e-4, atol=1e-5)
    assert facts.names == (DOWN.removesuffix(".mlp.down_proj.weight"), DOWN, "model.norm.weight")


def test_each_statistic_can_have_names_of_its_own(tmp_path):
    original = save("llama", tmp_path / "m")
    asked = {"moments": ["model.layers.1"], "input_moments": ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"]}
    facts = measured(tmp_path / "m", tmp_path, tuple(asked), names=asked)
    assert facts.names == ("lm_head.weight", "model.layers.1", "model.layers.1.mlp.up_proj.weight")
    state = inputs_of(original, "lm_head", batches("llama"))
    np.testing.assert_allclose(facts.get("lm_head.weight", "input.mean"), state.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(facts.get("lm_head.weight", "input.std"), state.std(0), rtol=1e-4)


def test_only_what_goes_in_is_shared(tmp_path):
    save("llama", tmp_path / "m")
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"]
    asked = {"moments": names[:1], "gram": names}
    facts = measured(tmp_path / "m", tmp_path, ("gram", "moments"), names=asked)
    assert facts.aliases == {names[1]: names[0]}
    assert (facts.fields(names[0]), facts.fields(names[1])) == (("count", "gram", "mean", "std"), ("count", "gram"))
    with pytest.raises(CheckpointError, match="no `mean`"):
        facts.get(names[1], "mean")


def test_squared_gradients_are_means_over_samples(tmp_path):
    original = save("llama", tmp_path / "m")
    data = batches("llama")
    facts = measured(tmp_path / "m", tmp_path, ("squared_gradients", "sensitivity"), labels="data")
    squares, totals = 0, []
    for batch in data:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()][None]
            original.zero_grad()
            original(input_ids=ids, labels=ids).loss.backward()
            weight = original.get_parameter(DOWN)
            squares = squares + (weight.grad * (ids.shape[1] - 1)).square() / 4
            totals.append(float((weight.detach() * weight.grad).abs().sum()))
    np.testing.assert_allclose(facts.get(DOWN, "squared_gradient"), squares, rtol=1e-3, atol=1e-5)
    assert float(facts.get(DOWN, "sensitivity")) == pytest.approx(np.mean(totals), rel=1e-4)
    assert float(facts.get(DOWN, "count")) == 4


def test_without_data_nothing_is_measured(tmp_path):
    save("llama", tmp_path / "m")
    with opened(tmp_path / "m") as model, pytest.raises(PlanError, match="no data"):
        record(model, [], ["gram"], made_of={}, root=tmp_path)


def test_statistics_of_both_kinds_are_no_one_pass(tmp_path):
    save("llama", tmp_path / "m")
    with pytest.raises(ValueError, match="one pass"):
        measured(tmp_path / "m", tmp_path, ("gram", "sensitivity"))


def test_two_models_are_compared_channel_by_channel(tmp_path):
    original = save("llama", tmp_path / "a")
    save("llama", tmp_path / "b")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name in tensors:
        if "mlp.down" in name:
            tensors[name] = tensors[name][:, order].contiguous()
        elif "mlp" in name:
            tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    with opened(tmp_path / "a") as first, opened(tmp_path / "b") as second:
        found = [
            record_pair(
                first,
                second,
                batches("llama"),
                "cross",
                made_of={},
                inputs=names,
                root=tmp_path / str(stream),
                stream=stream,
            )
            for stream in (True, False)
        ]
        products = record_pair(
            first, second, batches("llama"), "inner", made_of={}, inputs=names, root=tmp_path / "inner"
        )
        alike = record_pair(
            first,
            second,
            batches("llama"),
            "cka",
            made_of={},
            outputs=["model.layers.1", DOWN],
            inputs=names,
            root=tmp_path,
        )
    x = inputs_of(original, "model.layers.1.mlp.down_proj", batches("llama"))
    np.testing.assert_allclose(found[0].get(DOWN, "input.correlation"), np.corrcoef(x.T)[:, order], atol=1e-4)
    np.testing.assert_allclose(
        found[1].get(DOWN, "input.correlation"), found[0].get(DOWN, "input.correlation"), atol=1e-5
    )
    assert found[0].get(DOWN, "input.correlation").argmax(1).tolist() == order.argsort().tolist()
    np.testing.assert_allclose(products.get(DOWN, "input.inner"), (x.T @ x / len(x))[:, order], rtol=1e-3, atol=1e-6)
    strength = np.sqrt(np.square(x).mean(0))
    np.testing.assert_allclose(products.get(DOWN, "input.rms_1"), strength, rtol=1e-4)
    np.testing.assert_allclose(products.get(DOWN, "input.rms_2"), strength[order], rtol=1e-4)
    assert alike.fields(DOWN) == ("input.cka", "input.count", "output.cka", "output.count")
    assert float(alike.get("model.layers.1", "output.cka")) == pytest.approx(1, abs=1e-6)


def test_experts_of_two_models_see_other_tokens(tmp_path):
    save("mixtral", tmp_path / "m")
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    with opened(tmp_path / "m") as first, opened(tmp_path / "m") as model:
        with pytest.raises(ValueError, match="open it twice"):
            record_pair(model, model, batches("llama"), "cross", made_of={}, inputs=[name], root=tmp_path)
        with pytest.raises(PlanError, match="other tokens"):
            record_pair(first, model, batches("llama"), "cross", made_of={}, inputs=[name], root=tmp_path)


class Killed(BaseException):
    """What a kill is to the code: it cannot be caught as an error."""


@contextmanager
def killed_after(monkeypatch, passes):
    """Let only so many passes of a batch through a step come to an end."""
    left = [passes]
    batch = Tally.batch

    def counted(*args):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "batch", counted)
        yield


def contents(path):
    return {each.name: each.read_bytes() for each in sorted(path.iterdir())}


@pytest.mark.parametrize("passes", range(8))  # two batches through three blocks and the rest
def test_a_killed_run_goes_on_where_it_was(passes, tmp_path, monkeypatch):
    save("llama", tmp_path / "m")
    expected = contents(measured(tmp_path / "m", tmp_path / "1", ("gram", "moments")).path)
    with killed_after(monkeypatch, passes), pytest.raises(Killed):
        measured(tmp_path / "m", tmp_path / "2", ("gram", "moments"))
    (partial,) = (tmp_path / "2").glob(".*.partial")
    asked = []
    with opened(tmp_path / "m") as model:
        get = model.weights.get
        monkeypatch.setattr(model.weights, "get", lambda name: asked.append(name) or get(name))
        facts = record(model, batches("llama"), ["gram", "moments"], made_of={"model": 1}, root=tmp_path / "2")
    assert contents(facts.path) == expected
    read = {name.split(".")[2] for name in asked if name.startswith("model.layers")}
    assert read == {str(layer) for layer in range(3) if layer >= passes // 2}
    assert not partial.exists()
    assert [each.name for each in (tmp_path / "2").iterdir()] == [facts.path.name]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_activations_that_are_gone_are_made_again(spoil, tmp_path, monkeypatch):
    save("llama", tmp_path / "m")
    with killed_after(monkeypatch, 5), pytest.raises(Killed):
        measured(tmp_path / "m", tmp_path / "2")
    (lost,) = (tmp_path / "2").rglob("activations/0/model.layers.1/000001.safetensors")
    spoil(lost)
    expected = contents(measured(tmp_path / "m", tmp_path / "1").path)
    assert contents(measured(tmp_path / "m", tmp_path / "2").path) == expected


def test_a_run_begun_block_by_block_can_end_as_a_whole(tmp_path, monkeypatch):
    save("llama", tmp_path / "m")
    with killed_after(monkeypatch, 5), pytest.raises(Killed):
        measured(tmp_path / "m", tmp_path / "2")
    facts = measured(tmp_path / "m", tmp_path / "2", stream=False)
    expected = measured(tmp_path / "m", tmp_path / "1")
    assert facts.entries.keys() == expected.entries.keys()


KILL = """
import os, signal, sys
from pathlib import Path
from execute.forward.tiny import batches, opened
from mergetool.execute.record import record
with opened(Path(sys.argv[1])) as model:
    get = model.weights.get
    def fatal(name):
        if name == "model.layers.2.mlp.up_proj.weight":
            os.kill(os.getpid(), signal.SIGKILL)
        return get(name)
    model.weights.get = fatal
    record(model, batches("llama"), ["gram"], made_of={"model": 1}, root=Path(sys.argv[2]))
"""


def test_a_process_that_was_killed_leaves_what_another_goes_on_with(tmp_path):
    save("llama", tmp_path / "m")
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    command = [sys.executable, "-c", KILL, str(tmp_path / "m"), str(tmp_path / "2")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (steps,) = (tmp_path / "2").rglob("steps.json")
    assert list(json.loads(steps.read_text())["steps"]) == ["model.layers.0", "model.layers.1"]
    with pytest.raises(CheckpointError, match="not complete"):
        open_facts(steps.parent)
    expected = contents(measured(tmp_path / "m", tmp_path / "1").path)
    assert contents(measured(tmp_path / "m", tmp_path / "2").path) == expected


def test_what_was_measured_is_found_again(tmp_path, monkeypatch):
    save("llama", tmp_path / "m")
    first = measured(tmp_path / "m", tmp_path)
    with opened(tmp_path / "m") as model:
        monkeypatch.setattr(model.weights, "get", None)
        again = record(model, batches("llama"), ["gram"], made_of={"model": 1}, root=tmp_path)
    assert again.path == first.path
    assert measured(tmp_path / "m", tmp_path, names=[DOWN]).path != first.path


@pytest.mark.parametrize("stream", [True, False])
def test_activations_that_are_not_finite_are_named_and_leave_nothing(stream, tmp_path):
    save("llama", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"].fill_(1e30)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e30)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=r"tiny: model.layers.1.mlp.down_proj.weight: the input"):
        measured(tmp_path / "m", tmp_path / "facts", stream=stream)
    assert not list((tmp_path / "facts").rglob("*.safetensors"))


def spoiled(y):
    y.register_hook(lambda gradient: gradient * float("nan"))
    return y


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y * float("inf"), "tiny: what the network predicts holds a NaN"),
        (lambda y: y + (y - y.detach()) * float("nan"), "tiny: what the network predicts"),
        (lambda y: spoiled(y), "gradient holds a NaN"),
    ],
)
def test_gradients_that_are_not_finite_are_named(spoil, message, tmp_path):
    save("llama", tmp_path / "m")
    with opened(tmp_path / "m") as model:
        model.module.model.norm.register_forward_hook(lambda m, args, y: spoil(y))
        with pytest.raises(NonFinite, match=message):
            record(model, batches("llama"), ["sensitivity"], made_of={}, root=tmp_path / "facts")
    assert not list((tmp_path / "facts").rglob("*.safetensors"))


def test_a_step_can_be_run_again_with_other_weights(tmp_path):
    original = save("llama", tmp_path / "m")
    with torch.no_grad():
        original.model.layers[1].mlp.down_proj.weight.mul_(2)
    with opened(tmp_path / "m") as model:
        tally = Tally([GRAM], Watch(model, ["lm_head.weight"]))
        for step in streamed(model, batches("llama"), tally.watch, tmp_path / "activations"):
            for again in range(2):
                for i in range(2):
                    tally.batch([step.run], i)
                if step.name == "model.layers.1" and not again:
                    model.parameter("model.layers.1.mlp.down_proj.weight").data.mul_(2)
        facts, _ = tally.finish()
    x = inputs_of(original, "lm_head", batches("llama"))
    np.testing.assert_allclose(facts["lm_head.weight:gram"], 2 * x.T @ x, rtol=1e-4, atol=1e-3)


def test_a_stack_that_lies_idle_is_left_out(tmp_path):
    class Two(Flat):
        def __init__(self):
            super().__init__()
            self.text = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))})
            self.image = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))})

        def forward(self, x):
            for layer in self.text["layers"]:
                x = layer(x)
            return super().forward(x)

    folder = tmp_path / "m"
    folder.mkdir()
    save_file(Two().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    facts = measured(folder, tmp_path, data=[{"x": torch.ones(2, 4)}], adapter=lambda config: Two(), stream=True)
    assert facts.names == ("first.weight", "second.weight", "text.layers.0.weight", "text.layers.1.weight")
    assert facts.notes == ("never used on this data: `image.layers.0.weight`, `image.layers.1.weight`",)


def test_a_network_that_cannot_be_streamed_is_run_as_a_whole(tmp_path):
    save("albert", tmp_path / "m")
    with pytest.raises(CannotStream):
        measured(tmp_path / "m", tmp_path / "1", stream=True)
    facts = measured(tmp_path / "m", tmp_path / "2")
    assert facts.get("encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", "count") == 3 * 26


class Flat(torch.nn.Module):
    """A network without layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_network_without_layers_says_so(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    torch.manual_seed(0)
    net = Flat()
    save_file(net.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    data = [{"x": torch.randn(9, 4)}, {"x": torch.randn(3, 4)}]
    with pytest.raises(CannotStream, match="no list of layers"):
        measured(folder, tmp_path, data=data, adapter=lambda config: Flat(), stream=True)
    facts = measured(folder, tmp_path, data=data, adapter=lambda config: Flat())
    hidden = torch.cat([net.first(batch["x"]).relu() for batch in data]).detach()
    np.testing.assert_allclose(facts.get("second.weight", "gram"), hidden.T @ hidden, rtol=1e-4, atol=1e-5)


def test_a_name_that_took_no_part_is_an_error_if_it_was_asked_for(tmp_path, monkeypatch):
    save("llama", tmp_path / "m")
    with opened(tmp_path / "m") as model:
        layer = model.module.model.layers[1].mlp
        layer.forward = lambda x: layer.down_proj(layer.gate_proj(x))
        up = "model.layers.1.mlp.up_proj.weight"
        with pytest.raises(PlanError, match="took no part"):
            record(model, batches("llama"), ["gram"], made_of={}, names=[up], root=tmp_path)
        facts = record(model, batches("llama"), ["gram"], made_of={}, root=tmp_path)
    assert facts.notes == (f"never used on this data: `{up}`",)
    assert up not in facts.names


def test_progress_is_told_in_bytes_of_weights(tmp_path):
    class Told:
        done = total = closed = 0

        def start(self, total, label):
            self.total, self.label = total, label

        def advance(self, nbytes):
            self.done += nbytes

        def close(self):
            self.closed += 1

    save("llama", tmp_path / "m")
    told = Told()
    measured(tmp_path / "m", tmp_path, progress=told)
    assert (
        told.done == told.total == sum(4 * t.numel() for t in load_file(tmp_path / "m" / "model.safetensors").values())
    )
    assert (told.label, told.closed) == ("measure tiny", 1)


def test_the_identity_of_a_model_changes_with_its_files(tmp_path):
    save("llama", tmp_path)
    first = identity(open_checkpoint(str(tmp_path)))
    assert identity(open_checkpoint(str(tmp_path))) == first
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert identity(open_checkpoint(str(tmp_path))) != first


def test_models_of_one_size_and_time_are_told_apart_and_a_copy_is_not(tmp_path):
    save("llama", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    weights = load_file(tmp_path / "one" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for name in ("one", "copy", "other"):  # as they come out of an archive
        os.utime(tmp_path / name / "model.safetensors", ns=(1, 1))
    one, copy, other = (identity(open_checkpoint(str(tmp_path / name))) for name in ("one", "copy", "other"))
    assert one == copy
    assert [file[:3] for file in one["files"]] == [file[:3] for file in other["files"]]
    assert one != other
