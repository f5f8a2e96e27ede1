"""Biases that a model's config can switch on, so that a stock checkpoint holds the shifts of a correction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergetool.anatomy import Anatomy


@dataclass(frozen=True)
class Switch:
    """A key of the config that gives a bias to every linear of some roles at once.

    Attributes:
        key: the name of the key.
        roles: the roles of the linears that then have a bias, all of them.
        types: the model types that read the key so.
    """

    key: str
    roles: tuple[str, ...]
    types: str


_ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.o")
_MLP = ("mlp.gate", "mlp.up", "mlp.down")

SWITCHES = (
    Switch(
        "attention_bias",
        _ATTENTION,
        "llama qwen3 qwen3_moe gemma gemma2 gemma3_text olmo olmo2 olmo3 olmoe granite cohere cohere2 arcee smollm3 "
        "apertus nemotron bitnet phimoe hunyuan_v1_dense diffllama",
    ),
    Switch("mlp_bias", _MLP, "llama granite arcee smollm3 seed_oss nemotron helium"),
    Switch("use_bias", (*_ATTENTION, *_MLP), "ernie4_5 starcoder2"),
)
"""What transformers' own models do with these keys. Mistral and Qwen2 have none."""


def bias_of(weight: str) -> str:
    """The name that the bias of a weight has or would have."""
    return weight.removesuffix("weight") + "bias"


def switched_on(
    weights: Iterable[str], anatomy: Anatomy, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, int], dict[str, bool]]:
    """The biases that the config can switch on for these weights, with all that come along, and the switches.

    Args:
        weights: names of linears that want a bias and have none.
        anatomy: what every tensor is.
        config: the model's ``config.json``.
        shapes: name → shape of every tensor, as on disk, linears as [out, in].

    Returns:
        Name → length of every bias that the model then has and does not have on disk; what changes in the config.
    """
    added: dict[str, int] = {}
    changes: dict[str, bool] = {}
    wanted = {anatomy.parts[weight].role for weight in weights}
    for switch in SWITCHES:
        if config.get("model_type") not in switch.types.split() or wanted.isdisjoint(switch.roles):
            continue
        changes[switch.key] = True
        for name, part in anatomy.parts.items():
            if part.role in switch.roles and name.endswith("weight") and bias_of(name) not in shapes:
                added[bias_of(name)] = shapes[name][0]
    return added, changes


def no_place(weights: Iterable[str], anatomy: Anatomy, config: Mapping[str, Any]) -> list[str]:
    """A sentence for every role of these weights, whose shifts have no place."""
    roles: dict[str, list[str]] = {}
    for weight in weights:
        roles.setdefault(anatomy.parts[weight].role, []).append(weight)
    kind = config.get("model_type", "this kind")
    return [
        f"{role}: the scale is corrected and the mean is not, since models of type {kind} have no bias there "
        f"({len(names)} {'tensor' if len(names) == 1 else 'tensors'}, such as {names[0]})."
        for role, names in roles.items()
    ]
