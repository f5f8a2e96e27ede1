"""Local models: what is opened, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from mergetool.checkpoint.checkpoint import fetch, open_checkpoint
from mergetool.errors import CheckpointError, HeaderError
from mergetool.storage.reader import Reader

from .conftest import save

TENSORS = {"a": (2, 3), "b": (4,), "c": (), "d": (0, 2), "e": (5, 5)}


@pytest.mark.parametrize("limit", [1 << 30, 40])
def test_a_folder_is_the_union_of_what_its_files_hold(tmp_path, limit):
    folder = save(tmp_path / "m", TENSORS, limit)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"never read")
    found = open_checkpoint("m", tmp_path)
    assert {name: t.shape for name, t in found.tensors.items()} == TENSORS
    assert (found.config, found.files) == ({"model_type": "llama"}, ("config.json", "tokenizer.json"))
    assert (found.label, found.path, found.repo, found.commit, found.is_remote) == ("m", folder, None, None, False)
    assert len(found.weight_files) == (1 if limit > 40 else 3)
    assert found.companion("tokenizer.json") == b"{}"
    assert found.companion("absent.json") is None
    assert fetch(found, found.weight_files) is found
    for tensor in found.tensors.values():
        header = found.headers[tensor.file]
        with Reader(found.file(tensor.file), header) as reader:
            entry = header.entries[tensor.name]
            assert (entry.start, entry.nbytes, entry.size) == (tensor.start, tensor.nbytes, tensor.size)
            assert reader.read(entry).tolist() == list(range(tensor.size))


def test_a_file_by_itself_is_a_model(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "any.safetensors")
    (tmp_path / "stranger.json").write_text("[")
    found = open_checkpoint(str(tmp_path / "any.safetensors"))
    assert (found.config, found.files, found.weight_files) == ({}, (), ("any.safetensors",))
    assert found.file("any.safetensors").is_file()
    save(tmp_path, {"a": (30,), "b": (30,)}, 130, "v")
    assert len(open_checkpoint(str(tmp_path / "v.safetensors.index.json")).tensors) == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.safetensors", "m.gguf", "notes.md"])
def test_any_other_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pickle|adapter|GGUF|no weights"):
        open_checkpoint(str(tmp_path / name))


def sharded(tmp_path):
    folder = save(tmp_path / "m", {"a": (10,), "b": (10,), "c": (10,)}, 40)
    path = folder / "model.safetensors.index.json"
    return folder, path, json.loads(path.read_text())


def test_index_and_files_must_agree_and_every_difference_is_told(tmp_path):
    _, path, index = sharded(tmp_path)
    del index["weight_map"]["a"]
    index["weight_map"]["ghost"] = "model-00002-of-00003.safetensors"
    index["weight_map"]["b"], index["weight_map"]["c"] = index["weight_map"]["c"], index["weight_map"]["b"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="different saves") as caught:
        open_checkpoint("m", tmp_path)
    text = str(caught.value)
    assert "model-00002-of-00003.safetensors: lacks what model.safetensors.index.json says it holds: c, ghost" in text
    assert "model-00003-of-00003.safetensors: lacks" in text
    assert "holds what model.safetensors.index.json does not say it holds: b" in text


def test_a_file_with_a_tensor_that_the_index_does_not_know(tmp_path):
    folder, _, _ = sharded(tmp_path)
    save(tmp_path / "n", {"a": (10,), "extra": (2,)})
    os.replace(tmp_path / "n" / "model.safetensors", folder / "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="does not say it holds: extra"):
        open_checkpoint("m", tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    folder, _, _ = sharded(tmp_path)
    os.replace(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    save(tmp_path / "n", {"a": (10,)})
    os.replace(tmp_path / "n" / "model.safetensors", folder / "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors also holds: a"):
        open_checkpoint("m", tmp_path)


def test_all_missing_and_all_damaged_files_are_told_at_once(tmp_path):
    folder, _, _ = sharded(tmp_path)
    for number in (1, 3):
        path = folder / f"model-0000{number}-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HeaderError, match=r"00001-of[\s\S]*is truncated[\s\S]*00003-of[\s\S]*is truncated"):
        open_checkpoint("m", tmp_path)
    for number in (1, 3):
        (folder / f"model-0000{number}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00003\S* is missing[\s\S]*00003-of-00003\S* is missing"):
        open_checkpoint("m", tmp_path)


@pytest.mark.parametrize("file", ["../m.safetensors", "/etc/m.safetensors", "a/../../m.safetensors", "m.bin"])
def test_an_index_must_not_lead_out_of_its_folder(tmp_path, file):
    _, path, _ = sharded(tmp_path)
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="not a safetensors file in this folder"):
        open_checkpoint("m", tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "x", "[" * 9**6])
def test_a_broken_index_is_an_error_of_its_own(tmp_path, content):
    _, path, _ = sharded(tmp_path)
    path.write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        open_checkpoint("m", tmp_path)


@pytest.mark.parametrize("content", ["[]", "x", "[" * 10**6, b"\xff"])
def test_a_broken_config_is_an_error_of_its_own(tmp_path, content):
    folder = save(tmp_path / "m", TENSORS)
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint("m", tmp_path)


def test_a_quantised_model_is_refused_with_the_way_out(tmp_path):
    save(tmp_path / "m", {"a.weight": (2, 2), "a.weight_scale_inv": (1, 1)})
    with pytest.raises(CheckpointError, match=r"m: is quantised \(FP8 in blocks\)[\s\S]*16-bit"):
        open_checkpoint("m", tmp_path)


def test_opening_a_local_model_imports_no_heavy_library(tmp_path):
    save(tmp_path / "m", TENSORS)
    code = (
        "import sys; from mergetool.checkpoint.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]);"
        "sys.exit(bool({'huggingface_hub', 'torch', 'transformers', 'safetensors'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=False).returncode == 0
