"""Roles: what a tensor does in its model, in words that a recipe can filter by."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ROLES: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "one row per token of the vocabulary",
        "embedding.position": "one row per position, absolute or relative",
        "embedding.segment": "one row per segment or token type",
        "embedding.patch": "turns image patches or audio frames into vectors",
        "embedding.special": "a single learned vector: class, mask or register token",
        "attention.q": "query projection",
        "attention.k": "key projection",
        "attention.v": "value projection",
        "attention.qkv": "query, key and value fused in one matrix",
        "attention.kv": "key and value fused in one matrix",
        "attention.q_a": "query compression of latent attention",
        "attention.q_b": "query expansion of latent attention",
        "attention.kv_a": "key and value compression of latent attention",
        "attention.kv_b": "key and value expansion of latent attention",
        "attention.o": "output projection",
        "attention.norm": "norm inside the attention, such as on queries and keys",
        "attention.bias": "added to the attention scores: relative positions, sinks",
        "attention.cross.q": "query projection of cross-attention",
        "attention.cross.k": "key projection of cross-attention",
        "attention.cross.v": "value projection of cross-attention",
        "attention.cross.qkv": "query, key and value of cross-attention, fused",
        "attention.cross.kv": "key and value of cross-attention, fused",
        "attention.cross.o": "output projection of cross-attention",
        "attention.cross.norm": "norm inside cross-attention",
        "attention.cross.bias": "added to the scores of cross-attention",
        "mlp.gate": "gate of a gated MLP, shared experts included",
        "mlp.up": "first matrix of an MLP, shared experts included",
        "mlp.gate_up": "gate and up fused in one matrix",
        "mlp.down": "last matrix of an MLP, shared experts included",
        "expert.gate": "gate of routed experts: of one, or of all in one tensor",
        "expert.up": "first matrix of routed experts",
        "expert.gate_up": "gate and up of routed experts, fused",
        "expert.down": "last matrix of routed experts",
        "router": "chooses or weighs experts",
        "mixer.in": "input projection of a state-space, linear-attention or convolution block",
        "mixer.conv": "short convolution of such a block",
        "mixer.step": "makes the step sizes and the input-dependent state matrices of such a block",
        "mixer.state": "decay, skip and step bias of such a block, usually kept in float32",
        "mixer.norm": "norm inside such a block",
        "mixer.out": "output projection of such a block",
        "norm": "weight or bias of a normalisation on the residual stream",
        "scale": "a learned gain: layer scale, logit scale",
        "projector": "joins two widths or two modalities",
        "head": "one row per token of the vocabulary, at the output",
        "head.classifier": "one row per class, at the output",
        "head.transform": "dense layer before a head, poolers included",
        "buffer": "no weight at all: position ids, frequencies, masks, running statistics",
        "other": "none of these",
    }
)


def matches_role(role: str, wanted: str) -> bool:
    """Whether a role is the wanted one or lies in the wanted group: ``attention`` matches ``attention.q``."""
    return role == wanted or role.startswith(wanted + ".")
