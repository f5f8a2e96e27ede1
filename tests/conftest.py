"""One cache of compiled kernels for all test runs, fixed seeds, and tiny checkpoints made on the spot.

`tests/kernels` is no package on purpose: transformers asks whether a package `kernels` is installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file

# Numba keeps machine code beside the kernels it was made from: a folder that outlives the run saves minutes.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mergetool-tests")
os.environ.setdefault("MERGETOOL_CACHE", str(_CACHE))

settings.register_profile("mergetool", derandomize=True, deadline=None, database=None)
settings.load_profile("mergetool")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""The config of the tiny Llama."""


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the tiny Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (48, 16)}
    for layer in range(2):
        for name, shape in {
            "input_layernorm": (16,),
            "mlp.down_proj": (16, 40),
            "mlp.gate_proj": (40, 16),
            "mlp.up_proj": (40, 16),
            "post_attention_layernorm": (16,),
            "self_attn.k_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "self_attn.q_proj": (16, 16),
            "self_attn.v_proj": (8, 16),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {**shapes, "model.norm.weight": (16,), "lm_head.weight": (48, 16)}


def llama_tensors(variant: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The tiny Llama's weights; variant 0 is the base, every other a fine-tune that leaves half of them alone."""
    tensors = {}
    for number, (name, shape) in enumerate(llama_shapes().items()):
        values = np.random.default_rng(number).normal(scale=0.02, size=shape)
        if variant:
            random = np.random.default_rng([number, variant])
            values += random.normal(scale=0.001, size=shape) * random.integers(0, 2, shape)
        tensors[name] = values.astype(dtype)
    return tensors


def save_checkpoint(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> Path:
    """Write a folder of one safetensors file and its config; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config or CONFIG)))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder by name: `checkpoint("base")`, `checkpoint("tuned", variant=1, dtype=np.float16)`, or of tensors.

    Further tensors are given as `tensors`, further keys of the config as `config`.
    """

    def make(
        name: str,
        variant: int = 0,
        dtype: Any = np.float32,
        tensors: Mapping[str, np.ndarray] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        made = {**llama_tensors(variant, dtype), **(tensors or {})}
        return save_checkpoint(tmp_path / name, made, {**CONFIG, **(config or {})})

    return make


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of `base` and its fine-tunes `first`, `second` and `third`: two-layer Llamas in float32."""
    folder = tmp_path_factory.mktemp("models")
    names = ("base", "first", "second", "third")
    return {name: save_checkpoint(folder / name, llama_tensors(variant)) for variant, name in enumerate(names)}
