"""Llama-shaped checkpoints of a chosen size with realistic deltas, made on the fly.

Weights are normal with σ = 0.02, deltas normal with σ = 0.001 on half of the coordinates and exactly zero on the
rest, as in bfloat16 fine-tunes. A fine-tune is the base plus its own delta.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mergetool.storage.dtypes import dtype
from mergetool.storage.writer import Writer, shard

PIECE = 1 << 22
"""Coordinates made at once."""


@dataclass(frozen=True)
class Size:
    """The numbers of a Llama config."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(256, 4, 704, 8, 2, 2048),
    "100m": Size(768, 8, 2048, 12, 4, 16000),
    "0.3b": Size(1024, 24, 2816, 16, 4, 16000),
    "1.1b": Size(2048, 22, 5632, 32, 4, 32000),
    "4b": Size(3072, 36, 8192, 32, 8, 64000),
}


def shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model, in file order."""
    kv = size.hidden // size.heads * size.kv_heads
    yield "model.embed_tokens.weight", (size.vocabulary, size.hidden)
    for i in range(size.layers):
        for name, shape in {
            "input_layernorm": (size.hidden,),
            "mlp.down_proj": (size.hidden, size.intermediate),
            "mlp.gate_proj": (size.intermediate, size.hidden),
            "mlp.up_proj": (size.intermediate, size.hidden),
            "post_attention_layernorm": (size.hidden,),
            "self_attn.k_proj": (kv, size.hidden),
            "self_attn.o_proj": (size.hidden, size.hidden),
            "self_attn.q_proj": (size.hidden, size.hidden),
            "self_attn.v_proj": (kv, size.hidden),
        }.items():
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (size.hidden,)
    yield "lm_head.weight", (size.vocabulary, size.hidden)


def weights(tensors: Mapping[str, tuple[int, ...]]) -> int:
    """How many weights tensors have together."""
    return sum(map(prod, tensors.values()))


def many(count: int, fewest: int = 1 << 11, most: int = 1 << 15) -> dict[str, tuple[int, ...]]:
    """Many small tensors, their logarithms evenly spread between two numbers of weights; always the same."""
    spread = np.random.default_rng(count).random(count)
    sizes = (fewest * (most / fewest) ** spread).astype(int)
    return {f"model.layers.{i}.small.weight": (int(size),) for i, size in enumerate(sizes)}


def config(size: Size) -> dict[str, object]:
    """The config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _bits(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _piece(variant: int, number: int, piece: int, count: int) -> np.ndarray:
    """A run of one tensor's weights."""
    values = np.random.default_rng([number, piece]).standard_normal(count, np.float32) * np.float32(0.02)
    if variant:
        rng = np.random.default_rng([number, piece, variant])
        delta = rng.standard_normal(count, np.float32) * np.float32(0.001)
        delta[rng.random(count, np.float32) < 0.5] = 0
        values += delta
    return _bits(values)


def make(
    folder: Path, size: str | Size, variant: int = 0, tensors: Mapping[str, tuple[int, ...]] | None = None
) -> Path:
    """Make a checkpoint unless it is there; variant 0 is the base, others are its fine-tunes.

    Args:
        folder: where it goes.
        size: one of :data:`SIZES`, or another.
        variant: 0 for the base, else the number of the fine-tune.
        tensors: other tensors than the size's.
    """
    done = folder / "config.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sized = SIZES[size] if isinstance(size, str) else size
    wanted = tensors or dict(shapes(sized))
    (layout,) = shard([(name, dtype("BF16"), shape) for name, shape in wanted.items()], 1 << 50)
    with Writer(folder / layout.file, layout) as writer, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        pieces = (
            (number, piece, min(PIECE, entry.size - piece * PIECE), entry.start + 2 * piece * PIECE)
            for number, entry in enumerate(layout.header.entries.values())
            for piece in range(-(-entry.size // PIECE))
        )
        for _ in pool.map(lambda at: writer.write(_piece(variant, *at[:3]), at[3]), pieces):
            pass
    done.write_text(json.dumps(config(sized), indent=2))
    return folder
