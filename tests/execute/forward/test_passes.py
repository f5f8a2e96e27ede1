"""A model run block by block sees and makes what the whole model does, and that is what transformers makes of it."""

from __future__ import annotations

import pytest
import torch

from execute.forward.tiny import batches, opened, save
from mergetool.errors import PlanError
from mergetool.execute.forward.passes import REST, WHOLE, CannotStream, streamed, whole
from mergetool.execute.forward.watch import Watch

NAMES = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen3",
    "gpt2",
    "bert",
    "bert_pretraining",
    "bert_classifier",
    "vit",
    "mixtral",
    "mixtral_fused",
    "olmoe",
    "gpt_oss",
    "t5",
)


def everything(model):
    """Whatever can be watched in a model, but embeddings."""
    places = Watch(model).places
    inputs = {name for place in places if place.has_input for name in place.every}
    outputs = {name for place in places if place.kind != "embedding" and place.widths for name in place.every}
    return inputs, outputs | {block.name for block in model.blocks}


def collect(steps, count):
    found, names = {}, []
    for step in steps:
        names.append(step.name)
        for i in range(count):
            step.run(i, lambda seen, i=i: found.update({(seen.name, seen.side, seen.expert, i): seen.rows}))
    return found, names


@pytest.fixture
def both(tmp_path):
    """A model's activations, whole and block by block, and the model of transformers."""

    def run(name, given=None):
        original = save(name, tmp_path / name)
        data = given or batches(name)
        with opened(tmp_path / name) as model:
            watches = [Watch(model, *everything(model)) for _ in range(2)]
            first, _ = collect(whole(model, data, watches[0]), len(data))
            second, steps = collect(streamed(model, data, watches[1], tmp_path / "activations"), len(data))
            assert watches[0].leaders == watches[1].leaders
            assert steps == [*(block.name for block in model.blocks), REST]
            assert not [name for name, p in model.module.named_parameters() if not p.is_meta], "weights are let go"
        return first, second, original

    return run


@pytest.mark.parametrize("name", NAMES)
def test_block_by_block_is_the_whole(both, name):
    first, second, _ = both(name)
    assert first.keys() == second.keys()
    assert len(first) > 20
    for key, rows in first.items():
        torch.testing.assert_close(
            second[key], rows, rtol=1e-5, atol=1e-5 * float(rows.abs().max()) if rows.numel() else 0
        )


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "qwen3", "gpt2", "bert", "vit", "mixtral", "mixtral_fused", "olmoe"]
)
def test_blocks_make_what_transformers_makes(both, name):
    _, found, original = both(name)
    last = {}
    data = batches(name)
    blocks = [key for key in found if key[0].rpartition(".")[2].isdigit()]
    layers = max(int(key[0].rpartition(".")[2]) for key in blocks)
    stack = blocks[0][0].rpartition(".")[0]
    module = next(m for m in original.modules() if isinstance(m, torch.nn.ModuleList))[layers]
    module.register_forward_hook(lambda m, a, out: last.update(state=out[0] if isinstance(out, tuple) else out))
    for i, batch in enumerate(data):
        with torch.no_grad():
            original(**batch)
        state = last["state"]
        mask = batch.get("attention_mask")
        expected = state.flatten(0, 1) if mask is None else state[mask.bool()]
        torch.testing.assert_close(found[f"{stack}.{layers}", "output", None, i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "mixtral_fused", "olmoe"])
def test_padding_does_not_count(both, name):
    padded = batches(name)[:1]
    alone = [{key: value[i : i + 1, :n] for key, value in padded[0].items()} for i, n in enumerate((5, 7))]
    _, found, _ = both(name, padded)
    _, expected, _ = both(name, alone)
    for tensor, side, expert in {key[:3] for key in found}:
        parts = [expected[key] for i in range(2) if (key := (tensor, side, expert, i)) in expected]
        rows = found[tensor, side, expert, 0]
        torch.testing.assert_close(rows.sum(0), torch.cat(parts).sum(0), rtol=1e-4, atol=1e-4)
        assert len(rows) == sum(map(len, parts))


def test_tensors_with_one_input_are_told_once(tmp_path):
    save("llama", tmp_path)
    with opened(tmp_path) as model:
        watch = Watch(model, everything(model)[0])
        found, _ = collect(streamed(model, batches("llama"), watch, tmp_path / "a"), 2)
    layer = "model.layers.1"
    told = {name for name, *_ in found if name.startswith(layer)}
    assert told == {
        f"{layer}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    assert watch.leaders[f"{layer}.self_attn.v_proj.weight"] == f"{layer}.self_attn.q_proj.weight"
    assert watch.leaders[f"{layer}.mlp.up_proj.weight"] == f"{layer}.mlp.gate_proj.weight"


def test_the_input_of_an_expert_is_that_of_the_tokens_sent_to_it(tmp_path):
    original = save("mixtral", tmp_path)
    sent = {}
    experts = original.model.layers[1].mlp.experts
    experts.register_forward_hook(lambda module, args, out: sent.update(x=args[0], chosen=args[1]))
    (batch,) = batches("mixtral", padded=False)[:1]
    with torch.no_grad():
        original(**batch)
    with opened(tmp_path) as model:
        found, _ = collect(whole(model, [batch], Watch(model, everything(model)[0])), 1)
    for expert in range(4):
        rows = sent["x"][(sent["chosen"] == expert).any(-1)]
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"
        seen = found[name, "input", None, 0]  # in another order
        assert len(seen) == len(rows)
        torch.testing.assert_close(seen.T @ seen, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_block_that_is_run_several_times_cannot_be_streamed(tmp_path):
    save("albert", tmp_path)
    with opened(tmp_path) as model, pytest.raises(CannotStream, match="several times"):
        collect(streamed(model, batches("albert"), Watch(model), tmp_path / "a"), 2)


def test_a_network_that_looks_back_cannot_be_streamed(tmp_path):
    save("llama", tmp_path)
    with opened(tmp_path) as model:
        made = []
        model.blocks[0].module.register_forward_hook(lambda module, args, output: made.append(output))
        model.blocks[2].module.register_forward_pre_hook(lambda module, args: (args[0] + made[-1], *args[1:]))
        with pytest.raises(CannotStream, match="looks back"):
            collect(streamed(model, batches("llama"), Watch(model), tmp_path / "a"), 2)
        assert not any("forward" in vars(block.module) for block in model.blocks)


def test_padding_that_cannot_be_told_is_an_error(tmp_path):
    save("t5", tmp_path)
    given = batches("t5")
    given[0]["attention_mask"][0, 3:] = 0
    with opened(tmp_path) as model, pytest.raises(PlanError, match="encoder and a decoder"):
        collect(whole(model, given, Watch(model)), 2)


def test_data_that_does_not_suit_is_an_error(tmp_path):
    save("llama", tmp_path)
    with opened(tmp_path) as model:
        assert next(iter(whole(model, [], Watch(model)))).name == WHOLE
        for wrong in ({"input_ids": torch.tensor([[1, 99]])}, {"pictures": torch.ones(1, 2)}):
            with pytest.raises(PlanError, match="cannot be run on this data"):
                collect(whole(model, [wrong], Watch(model)), 1)


def test_a_name_that_cannot_be_watched_is_an_error(tmp_path):
    save("llama", tmp_path)
    with opened(tmp_path) as model:
        with pytest.raises(PlanError, match=r"did you mean .*gate_proj"):
            Watch(model, {"model.layers.0.mlp.gat_proj.weight"})
        with pytest.raises(PlanError, match="could be seen"):
            Watch(model, {"model.norm.weight"})
