"""Llama folders of a few hundred weights, and merges of them run in full."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import save_file

from mergetool.execute import run
from mergetool.plan import build
from mergetool.recipe import load

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "x_unknown": {"kept": [1, 2.5e-06, None]},
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

RECIPE = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: one
    parameters: {weight: 0.5}
  - model: two
    parameters: {weight: 0.3}
"""


def shapes(layers=2):
    names = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        names |= {
            f"{at}.input_layernorm.weight": (8,),
            f"{at}.post_attention_layernorm.weight": (8,),
            f"{at}.self_attn.q_proj.weight": (8, 8),
            f"{at}.self_attn.k_proj.weight": (4, 8),
            f"{at}.self_attn.v_proj.weight": (4, 8),
            f"{at}.self_attn.o_proj.weight": (8, 8),
            f"{at}.mlp.gate_proj.weight": (12, 8),
            f"{at}.mlp.up_proj.weight": (12, 8),
            f"{at}.mlp.down_proj.weight": (8, 12),
        }
    return names


def llama(folder, seed=0, readme="", files=None, **config):
    """A model folder; ``files`` are more files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    if readme:
        (folder / "README.md").write_text(readme)
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def merged(home, text=RECIPE, output="merged", shard_size=5_000_000_000):
    """Merge by a recipe in ``home``; the output folder, the plan and the report."""
    (home / "recipe.yaml").write_text(text)
    plan = build(load(home / "recipe.yaml"), shard_size=shard_size, workers=2, output=home / output)
    report = run(plan)
    return SimpleNamespace(folder=home / output, plan=plan, report=report)


def three(home, **one):
    """The sources that the recipe names."""
    llama(home / "base", 0)
    llama(home / "one", 1, **one)
    llama(home / "two", 2)
    return home
