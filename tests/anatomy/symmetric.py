"""Models whose symmetries are known, random permutations of them, and their outputs with any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file, save_file

from mergetool.anatomy import DEFAULT_KINDS, Turning, anatomy, symmetries, turned_array

from .models import LLAMA, MODELS

MORE = {
    "gqa_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gqa": ("llama", {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "qwen3_experts": ("qwen3_moe", {"num_experts_per_tok": 2}),
    "olmoe_experts": ("olmoe", {"num_experts_per_tok": 2}),
    "deepseek_experts": ("deepseek_v3", {"num_experts_per_tok": 2}),
    "phi3_gqa": ("phi3", {"num_key_value_heads": 2}),
}

STRANGE = {
    "diffllama": ("DiffLlamaForCausalLM", "DiffLlamaConfig", LLAMA),
    "doge": ("DogeForCausalLM", "DogeConfig", LLAMA),
    "bitnet": ("BitNetForCausalLM", "BitNetConfig", LLAMA),
    "norms_of_heads": ("StableLmForCausalLM", "StableLmConfig", {**LLAMA, "qk_layernorm": True}),
    "xglm": ("XGLMForCausalLM", "XGLMConfig", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "vocab_size": 256}),
}
"""Models that look like others and have something that binds units to their order."""


@dataclass(frozen=True)
class Made:
    """A saved model of transformers."""

    name: str
    config: dict
    tensors: dict[str, np.ndarray]

    def groups(self, kinds=DEFAULT_KINDS):
        shapes = {name: values.shape for name, values in self.tensors.items()}
        return symmetries(anatomy(self.config, shapes), self.config, shapes, kinds)

    def get(self, name):
        return self.tensors[name]


@cache
def made(name: str) -> Made:
    """A tiny model with random weights everywhere: nothing hides behind ones and zeros."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, changes = MORE.get(name, (name, {}))
    model_class, config_class, arguments = {**MODELS, **STRANGE}[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**arguments, **changes}))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        return Made(name, config, load_file(Path(folder, "model.safetensors")))


def random_permutations(groups, seed=0):
    random = np.random.default_rng(seed)
    return {group.name: random.permutation(group.size) for group in groups}


def turned(tensors, groups, permutations):
    """All tensors, turned."""
    turning = Turning(groups, permutations)
    result = {}
    for name, values in tensors.items():
        turn = turning.of(name, values.shape)
        result[name] = turned_array(tensors[turn.tensor], turn.indices)
    return result


def outputs(model: Made, tensors, seed=0):
    """The logits, or the last hidden states, of transformers' own model with these tensors on disk."""
    import torch
    import transformers

    kind = MORE.get(model.name, (model.name,))[0]
    with TemporaryDirectory() as folder:
        save_file(
            {name: np.ascontiguousarray(values) for name, values in tensors.items()},
            f"{folder}/model.safetensors",
            {"format": "pt"},
        )
        Path(folder, "config.json").write_text(json.dumps(model.config))
        loaded, info = getattr(transformers, MODELS[kind][0]).from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
    assert not info["missing_keys"], info["missing_keys"]
    random = np.random.default_rng(seed)
    ids = torch.tensor(random.integers(3, 250, (2, 9)))
    inputs = {"input_ids": ids}
    if "vision" in str(model.config.get("vision_config", "")) or "image_size" in model.config:
        pixels = torch.tensor(random.normal(size=(2, 3, 16, 16)), dtype=torch.float32)
        inputs = (
            {"pixel_values": pixels} if "image_size" in model.config else {"input_ids": ids, "pixel_values": pixels}
        )
    if model.config.get("is_encoder_decoder"):
        inputs["decoder_input_ids"] = ids
    if model.config["model_type"] == "whisper":
        features = torch.tensor(random.normal(size=(2, 80, 3000)), dtype=torch.float32)
        inputs = {"input_features": features, "decoder_input_ids": ids}
    with torch.no_grad():
        found = loaded.eval()(**inputs)
    result = found.get("logits", found.get("last_hidden_state", found.get("logits_per_image", found[0])))
    return result.numpy().astype(np.float64)
