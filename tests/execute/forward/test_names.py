"""Every parameter has its tensors on disk and every tensor its parameter, both ways; what does not fit is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from execute.forward.tiny import MODELS, build, opened, save
from mergetool.errors import CheckpointError, NonFinite, ShapeMismatch


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_of_transformers_and_go_back_to_disk(name, tmp_path):
    original = save(name, tmp_path)
    with opened(tmp_path) as model:
        model.load(model.groups)
        ours = dict(model.module.named_parameters(remove_duplicate=False))
        for parameter, value in original.named_parameters(remove_duplicate=False):
            assert torch.equal(ours[parameter], value), parameter
        on_disk = load_file(tmp_path / "model.safetensors")
        back = {}
        for group in model.groups:
            values = {p: model.module.get_parameter(p).detach() for p in group.parameters if model.has_parameter(p)}
            back |= group.undo(values, model.module) if values else {}
        assert back.keys() == on_disk.keys()
        assert all(torch.equal(back[key], on_disk[key]) for key in back)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "mixtral", "t5"])
def test_what_is_computed_ahead_is_that_of_transformers(name, tmp_path):
    original = save(name, tmp_path)
    with opened(tmp_path) as model:
        ours = dict(model.module.named_buffers())
        for path, buffer in original.named_buffers():
            assert torch.equal(ours[path], buffer), path


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_base_model_is_found_with_and_without_its_prefix(tmp_path):
    original = save("llama", tmp_path)

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewritten(tmp_path, bare)
    with opened(tmp_path) as model:
        assert [block.name for block in model.blocks] == ["layers.0", "layers.1", "layers.2"]
        model.load(model.groups)
        assert torch.equal(model.module.model.norm.weight, original.model.norm.weight)


def test_a_head_that_is_tied_and_on_disk_is_not_read(tmp_path):
    original = save("llama_tied", tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(64, 16)}))
    with opened(tmp_path) as model:
        model.load(model.groups)
        assert torch.equal(model.module.lm_head.weight, original.lm_head.weight)


def test_what_is_missing_is_named(tmp_path):
    save("llama", tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks .*`model.layers.1.mlp.up_proj.weight`"), opened(tmp_path):
        pass


def test_what_has_no_place_is_named(tmp_path):
    save("llama", tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"no place in LlamaForCausalLM: `model.extra.weight`"), opened(tmp_path):
        pass


def test_a_buffer_of_old_files_is_no_stranger(tmp_path):
    save("llama", tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    with opened(tmp_path) as model:
        assert len(model.blocks) == 3


def test_a_wrong_shape_is_named(tmp_path):
    save("llama", tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ShapeMismatch, match=r"model.norm.weight: has the shape \[5\], the config says \[16\]"):  # noqa: SIM117
        with opened(tmp_path):
            pass


def test_an_expert_that_is_missing_is_an_error(tmp_path):
    save("mixtral", tmp_path)
    rewritten(tmp_path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    with opened(tmp_path) as model, pytest.raises(CheckpointError, match=r"experts"):
        model.load(model.groups)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    save("llama", tmp_path)
    rewritten(tmp_path, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].fill_(float("nan")))
    with opened(tmp_path) as model, pytest.raises(NonFinite, match=r"model.layers.2.mlp.up_proj.weight"):
        model.load(model.groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llamma"}, "model type `llamma`"),
        ({"model_type": None}, "no `model_type`"),
        ({"model_type": "own", "auto_map": {"AutoModel": "own.py"}}, "code that it brings along is not run"),
        ({"architectures": ["LlamaForPoetry"]}, "knows no architecture LlamaForPoetry"),
        ({"hidden_size": "wide"}, "config"),
    ],
)
def test_a_config_that_makes_no_network_is_an_error(change, message, tmp_path):
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message), opened(tmp_path):
        pass


def test_a_config_without_an_architecture_means_the_network_that_fits(tmp_path):
    for name, kind in (("llama", "LlamaForCausalLM"), ("bert", "BertModel")):
        folder = tmp_path / name
        save(name, folder)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        with opened(folder) as model:
            assert type(model.module).__name__ == kind


class Net(torch.nn.Module):
    """What an adapter may make."""

    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
        self.head = torch.nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def adapted(folder):
    torch.manual_seed(0)
    net = Net(6)
    folder.mkdir(exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"width": 6}))
    return net


def test_an_adapter_makes_what_transformers_does_not_know(tmp_path):
    net = adapted(tmp_path)
    with opened(tmp_path, lambda config: Net(config["width"])) as model:
        model.load(model.groups)
        assert [block.name for block in model.blocks] == ["layers.0", "layers.1", "layers.2"]
        x = torch.ones(2, 6)
        assert torch.equal(model.module(x), net(x))


def test_an_adapter_that_fails_is_named(tmp_path):
    adapted(tmp_path)
    with pytest.raises(CheckpointError, match="the adapter's `network` fails: 'depth'"):  # noqa: SIM117
        with opened(tmp_path, lambda config: Net(config["depth"])):
            pass
    with pytest.raises(CheckpointError, match="makes a int"), opened(tmp_path, lambda config: 3):
        pass


def test_weights_are_read_in_every_precision(tmp_path):
    model = build("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    with opened(tmp_path) as opened_model:
        name = "model.norm.weight"
        found = opened_model.weights.get(name)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found, model.state_dict()[name].float())
