"""How models lay out what they fuse, as data: the order of queries, keys and values, of gate and up, of axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt"})
_QKV: Mapping[str, frozenset[str]] = {
    # all queries, all keys, all values
    "blocks": frozenset({"gpt2", "openai-gpt", "imagegpt", "phi3", "qwen", "modernbert", "mpt"}),
    # for each key-value head: its queries, its key, its value
    "grouped": frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "internlm2"}),
}
_HALVES = frozenset(
    {"phi3", "glm", "glm4", "modernbert", "granitemoe", "granitemoeshared", "granitemoehybrid", "mixtral"}
    | {"qwen2_moe", "qwen3_moe", "olmoe", "llama4", "llama4_text"}
)
_INTERLEAVED = frozenset({"gpt_oss"})
_TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text"})
_ALIBI = frozenset({"bloom", "mpt"})


def model_type(config: Mapping[str, Any]) -> str:
    """The model type that a config states, or nothing."""
    return str(config.get("model_type", ""))


def transposed(config: Mapping[str, Any]) -> bool:
    """Whether matrices are ``[in, out]``, the layout of GPT-2's Conv1D."""
    return model_type(config) in _CONV1D


def transposed_experts(config: Mapping[str, Any]) -> bool:
    """Whether fused experts are ``[experts, in, out]``."""
    return model_type(config) in _TRANSPOSED_EXPERTS


def qkv_layout(config: Mapping[str, Any]) -> str:
    """``blocks``, ``grouped``, or nothing where it is not known."""
    kind = model_type(config)
    return next((layout for layout, types in _QKV.items() if kind in types), "")


def gate_up_layout(config: Mapping[str, Any]) -> str:
    """``halves``, ``interleaved``, or nothing where it is not known."""
    kind = model_type(config)
    return "halves" if kind in _HALVES else "interleaved" if kind in _INTERLEAVED else ""


def heads_have_places(config: Mapping[str, Any]) -> bool:
    """Whether a head's number means something: ALiBi gives each its own slope."""
    return bool(config.get("alibi")) or model_type(config) in _ALIBI


def positions_are_known(config: Mapping[str, Any]) -> bool:
    """Whether the config says that positions turn or bias the attention, rather than being added to the stream."""
    said = any(word in key for key, value in config.items() if value for word in ("rope", "rotary"))
    return said or heads_have_places(config)


def config_of(config: Mapping[str, Any], stack: str) -> Mapping[str, Any]:
    """The part of a composed model's config that speaks of one stack."""
    words = {"vision": "vision_config", "visual": "vision_config", "audio": "audio_config"}
    for word, key in words.items():
        if word in stack and isinstance(config.get(key), Mapping):
            return dict(config[key])
    for key in ("text_config", "llm_config"):
        if isinstance(config.get(key), Mapping):
            return dict(config[key])
    return config


_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "encoder_attention_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_HEAD_DIM = ("head_dim", "d_kv", "attention_head_size", "kv_channels")


def head_counts(config: Mapping[str, Any], stack: str) -> tuple[int | None, int | None, int | None]:
    """Query heads, key-value heads and the width of a head, as far as the config states them."""
    own = ("decoder_attention_heads",) if "decoder" in stack else ()
    heads = _first(config, (*own, *_HEADS))
    return heads, _first(config, _KEY_VALUE_HEADS) or heads, _first(config, _HEAD_DIM)


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    found = (config.get(key) for key in keys)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
