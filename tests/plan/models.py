"""Tiny models on disk, for the tests of plans and runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mergetool.plan import Plan, build
from mergetool.recipe import load
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.writer import Writer, index, shard

Tensors = dict[str, tuple[str, np.ndarray]]
"""By name: the dtype, and the raw elements in their shape."""

LAYER = "model.layers.{}."
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


def bits(values, dtype):
    """Numbers as raw elements of a dtype; bfloat16 by cutting, so that nothing of the product is used."""
    values = np.asarray(values)
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return values.astype(DTYPES[dtype].storage)


def normal(shape, dtype, *seed):
    """Normal numbers from a seed; of float8 dtypes, codes of moderate numbers."""
    numbers = np.random.default_rng(seed)
    if dtype.startswith("F8"):
        return (numbers.integers(0, 0x60, shape) | numbers.integers(0, 2, shape) << 7).astype(np.uint8)
    return bits(numbers.standard_normal(shape), dtype)


def shapes(layers=2, hidden=8, vocabulary=24):
    """The tensors of a small llama."""
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        start = LAYER.format(layer)
        found[start + "self_attn.q_proj.weight"] = (hidden, hidden)
        found[start + "mlp.down_proj.weight"] = (hidden, 2 * hidden)
        found[start + "input_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def llama(seed, dtype="BF16", **sizes) -> Tensors:
    """A small llama; the seed decides its numbers."""
    return {
        name: (dtype, normal(shape, dtype, seed, number))
        for number, (name, shape) in enumerate(shapes(**sizes).items())
    }


def save(folder: Path, tensors: Tensors, limit=1 << 40, config=None, **more) -> Path:
    """Write a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = shard([(name, DTYPES[dtype], raw.shape) for name, (dtype, raw) in tensors.items()], limit)
    for part in parts:
        with Writer(folder / part.file, part) as writer:
            for entry in part.header.entries.values():
                writer.write(np.ascontiguousarray(tensors[entry.name][1]).reshape(-1), entry.start)
    if len(parts) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index(parts)))
    layers = len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    (folder / "config.json").write_text(json.dumps(config or {**CONFIG, "num_hidden_layers": layers, **more}))
    return folder


def trio(folder: Path, dtype="BF16", limit=1 << 40, **sizes) -> Path:
    """The models ``base``, ``a`` and ``b``."""
    for seed, name in enumerate(("base", "a", "b")):
        save(folder / name, llama(seed, dtype, **sizes), limit)
    return folder


TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters: {weight: [0.25, 1]}
parameters:
  density: 0.5
"""


def planned(folder: Path, text: str = TIES, **options) -> Plan:
    """The plan of a recipe that lies in a folder beside its models."""
    path = folder / "merge.yaml"
    path.write_text(text)
    return build(load(path), **options)


def sparse(folder: Path, sizes: dict[str, tuple[int, ...]], dtype="BF16") -> Path:
    """A model whose header is real and whose data are a hole in the file."""
    folder.mkdir(parents=True)
    (part,) = shard([(name, DTYPES[dtype], shape) for name, shape in sizes.items()], 1 << 50)
    path = folder / part.file
    path.write_bytes(part.preamble)
    with path.open("r+b") as file:
        file.truncate(part.nbytes)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
