"""A network that is dealt out to several devices computes the same; which GPUs there are is played by the CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

from execute.forward.tiny import batches, opened, save
from mergetool.errors import PlanError
from mergetool.execute.forward.gradients import backward
from mergetool.execute.forward.model import Model, open_model
from mergetool.execute.forward.spread import layout, loaded
from mergetool.execute.record import record


def on(model: Model, devices: str) -> Model:
    """The same model on other devices."""
    model.devices = tuple(torch.device(name) for name in devices.split(","))
    model.device = model.devices[0]
    return model


def test_blocks_are_dealt_out_in_order_about_evenly(tmp_path):
    save("llama", tmp_path)
    with opened(tmp_path) as model:
        # Embeddings and head have as many bytes as the three blocks and lie on the first.
        found = layout(on(model, "cuda:0,cuda:1,cuda:3"))
        assert list(found) == [block.path for block in model.blocks]
        assert list(map(str, found.values())) == ["cuda:1", "cuda:1", "cuda:3"]
        assert list(map(str, layout(on(model, "cuda:0,cuda:1")).values())) == ["cuda:0", "cuda:1", "cuda:1"]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "vit"])
def test_weights_and_buffers_go_where_their_block_goes_and_come_back(name, tmp_path):
    save(name, tmp_path)
    with opened(tmp_path) as model:
        on(model, "cpu,meta")
        before = {key: str(module.forward) for key, module in model.module.named_modules()}
        with loaded(model):
            places = model.layout
            assert {place.type for place in places.values()} == {"cpu", "meta"}
            for key, tensor in (*model.module.named_parameters(), *model.module.named_buffers()):
                block = model.block_of(key)
                assert tensor.device == (places[block.path] if block else torch.device("cpu")), key
            for block in model.blocks:
                assert block.module._hf_hook.execution_device == places[block.path]
        assert model.layout == {}
        assert {key: str(module.forward) for key, module in model.module.named_modules()} == before
        assert all(parameter.is_meta for parameter in model.module.parameters())


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral_fused", "bert", "t5"])
def test_activations_are_the_same(name, tmp_path):
    save(name, tmp_path / "model")
    found = []
    for devices in ("cpu", "cpu,cpu,cpu"):
        with opened(tmp_path / "model") as model:
            root = tmp_path / devices
            how = {"made_of": {}, "stream": False, "root": root}
            found.append(record(on(model, devices), batches(name), ["gram", "moments"], **how))
    first, second = (load_file(facts.path / "0000.safetensors") for facts in found)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_gradients_are_the_same(name, tmp_path):
    save(name, tmp_path)
    found = []
    for devices in ("cpu", "cpu,cpu"):
        with opened(tmp_path) as model:
            sums = {}

            def told(seen, sums=sums):
                sums[seen.name] = sums.get(seen.name, 0) + seen.gradient

            with loaded(on(model, devices), gradients=True):
                backward(model, batches(name)[0], told)
            found.append(sums)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_without_accelerate_it_is_said_what_to_install(tmp_path, monkeypatch):
    save("llama", tmp_path)
    monkeypatch.setitem(sys.modules, "accelerate.hooks", None)
    with opened(tmp_path) as model:
        with (
            pytest.raises(PlanError, match=r"needs accelerate\n.*pip install 'mergetool\[gpus\]'"),
            loaded(on(model, "cpu,cpu")),
        ):
            pass
        with loaded(on(model, "cpu")):
            pass
        checkpoint = model.weights
        assert open_model(model.module.config.to_dict(), checkpoint, "x", device="cpu,meta").devices[1].type == "meta"
