"""Which files are weights and which are companions, by name."""

from __future__ import annotations

import pytest

from mergetool.checkpoint.layout import companions, weight_file
from mergetool.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "consolidated.safetensors", "original/model.safetensors"], "model.safetensors"),
        ([INDEX, "model-00001-of-00001.safetensors", "consolidated.safetensors"], INDEX),
        (["model.safetensors", INDEX], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "config.json"], "diffusion_pytorch_model.safetensors"),
        (["model.fp16.safetensors", "adapter_model.safetensors"], "model.fp16.safetensors"),
        (
            ["x.safetensors.index.json", "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"],
            "x.safetensors.index.json",
        ),
    ],
)
def test_the_weights_are_found(names, expected):
    assert weight_file(names, "m") == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.safetensors", "b.safetensors"], r"several models: a\.safetensors, b\.safetensors[\s\S]*name the file"),
        (["model-00001-of-00002.safetensors"], "no model.safetensors.index.json"),
        (["adapter_model.safetensors", "adapter_config.json"], r"LoRA adapter[\s\S]*merge_and_unload"),
        (["consolidated.00.safetensors"], "vendor's own layout"),
        (["pytorch_model.bin", "config.json"], r"pickle[\s\S]*safe_serialization"),
        (["m.Q4_K.gguf"], "GGUF"),
        (["unet/model.safetensors", "vae/model.safetensors"], "unet, vae"),
        (["config.json"], "holds no weights"),
    ],
)
def test_what_is_no_model_is_named(names, message):
    with pytest.raises(CheckpointError, match=message):
        weight_file(names, "m")


def test_companions_are_all_that_a_model_needs_besides_weights():
    carried = [
        "1_Pooling/config.json",
        "LICENSE",
        "NOTICE.md",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "modeling_x.py",
        "qwen.tiktoken",
        "tokenizer.model",
    ]
    left = ["README.md", INDEX, "model.safetensors", "pytorch_model.bin", "m.gguf", "tf_model.h5", "m.onnx"]
    left += ["flax_model.msgpack", "optimizer.pt", ".gitattributes", "original/params.json", "adapter_config.json"]
    left += ["checkpoint-5/config.json", "trainer_state.json", ".cache.json"]
    assert companions(reversed(carried + left)) == tuple(carried)
