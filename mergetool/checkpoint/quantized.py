"""How a checkpoint is quantised, told from its config and the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# How a tensor's name ends in one family of quantised checkpoints and in no other; the first match counts.
_SUFFIXES = (
    (".weight_scale_inv", "FP8 in blocks"),
    (".weight_scale_2", "NVFP4"),
    (".weight_packed", "compressed-tensors, packed integers"),
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".W_q", "HQQ"),
    (".weight.absmax", "bitsandbytes, 4 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".SCB", "bitsandbytes, 8 bits"),
)

# A tensor is quantised when all of these stand beside one another under the same prefix.
_TOGETHER = (
    (("_blocks", "_scales"), "MXFP4"),
    ((".weight", ".weight_scale"), "FP8 with scales"),
    ((".weight", ".scales", ".biases"), "MLX"),
)


def quantization(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The quantisation scheme of a checkpoint in words, or None where its tensors are plain numbers.

    Args:
        config: the content of ``config.json``; the text part of a multimodal config is looked at too.
        names: the names of the tensors.
    """
    for part in (config, config.get("text_config")):
        scheme = _from_config(part) if isinstance(part, Mapping) else None
        if scheme is not None:
            return scheme
    return _from_names(names)


def _from_config(config: Mapping[str, Any]) -> str | None:
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if not isinstance(settings, Mapping) or not settings:
            continue
        method = str(settings.get("quant_method") or settings.get("quant_algo") or "")
        # bitsandbytes leaves its settings behind, switched off, in configs of 16-bit models
        if method in ("", "bitsandbytes") and settings.get("load_in_4bit") is settings.get("load_in_8bit") is False:
            continue
        details = [method] if method else []
        details += [f"{settings[bits]} bits" for bits in ("bits", "w_bit", "weight_bits") if settings.get(bits)]
        details += [str(settings[name]) for name in ("fmt", "format") if settings.get(name)]
        return ", ".join(details) or f"config.{key}"
    return None


def _from_names(names: Collection[str]) -> str | None:
    known = names if isinstance(names, (set, frozenset, Mapping)) else frozenset(names)
    for suffix, scheme in _SUFFIXES:
        if any(name.endswith(suffix) for name in known):
            return scheme
    for (first, *others), scheme in _TOGETHER:
        for name in known:
            if name.endswith(first):
                stem = name[: len(name) - len(first)]
                if all(stem + other in known for other in others):
                    return scheme
    return None
