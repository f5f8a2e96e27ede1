"""The grammar of tensor names: prefix → stack, number → layer or expert, suffix → role."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from mergetool.anatomy.families import Family
from mergetool.anatomy.words import (
    BEFORE,
    BLOCK_LEAVES,
    BLOCKS,
    CONTAINER,
    INNER_NORM,
    KEEP_DTYPE,
    LEAVES,
    MTP,
    NORM,
    PARAMETER_ENDING,
    PARAMETERS,
    SCALE,
    SWALLOWING,
)

_NUMBER = re.compile(r"(?<![^.])(expert_)?[0-9]{1,9}(?![^.])")


@dataclass(frozen=True, slots=True)
class Template:
    """What all names that differ only in numbers have in common.

    ``layer_at`` and ``expert_at`` say which component of the name is that number; ``loose_depth``
    is the depth of a name without a layer.
    """

    role: str
    layer_at: int | None
    expert_at: int | None
    loose_depth: float
    keep_dtype: bool
    predicts_further: bool


def template_of(name: str) -> str:
    """The name with every numeric component replaced by ``#``."""
    return _NUMBER.sub("#", name)


def has_container(template: str) -> bool:
    """Whether a word that layers are known by stands before a number."""
    words = template.split(".")
    return any(word == "#" and CONTAINER.search(previous) for previous, word in pairwise(words))


def read_template(template: str, family: Family, sequence: bool = False) -> Template:
    """Parse a template.

    Args:
        template: a name with ``#`` for its numbers.
        family: its own suffixes come before the general words.
        sequence: whether the members of a bare sequence (``net.0.weight``) count as layers.
    """
    words = template.split(".")
    layer_at, expert_at = _numbers(words, sequence)
    path = [word for word in words[0 if layer_at is None else layer_at + 1 :] if word != "#"]
    plain = [word for word in words if word != "#"]
    role = _role(path, plain, family.roles, layer_at is not None)
    return Template(
        role=role,
        layer_at=layer_at,
        expert_at=expert_at,
        loose_depth=_loose_depth(role, plain, family),
        keep_dtype=role == "buffer" or (bool(path) and path[-1] in KEEP_DTYPE),
        predicts_further=not MTP.isdisjoint(path),
    )


def _numbers(words: list[str], sequence: bool) -> tuple[int | None, int | None]:
    """Which component is the layer's number, and which the expert's."""
    layer = expert = None
    certain = False
    for at, word in enumerate(words):
        if word != "#":
            continue
        previous = words[at - 1] if at else ""
        if BLOCKS.get(previous) in ("expert", "shared"):
            if expert is None and BLOCKS[previous] == "expert":
                expert = at
        elif CONTAINER.search(previous):
            if not certain:
                layer, certain = at, True
        elif layer is None and (sequence or at < len(words) - 2):
            layer = at
    return layer, expert


def _loose_depth(role: str, words: list[str], family: Family) -> float:
    """0 before the layers, 1 after them, as far as a name can tell."""
    if any(word in family.after or BLOCKS.get(word) == "head" for word in words) or role.startswith("head"):
        return 1.0
    before = role.startswith("embedding") or role == "attention.bias" or any(map(BEFORE.search, words))
    return 0.0 if before else 1.0


def _role(path: list[str], whole: list[str], roles: Mapping[str, str], layered: bool) -> str:
    """The role of the tensor at ``path``, the components after the layer's number."""
    parameter = path[-1] if path and path[-1] in PARAMETERS else ""
    path, whole = (path[:-1], whole[:-1]) if parameter else (path, whole)
    path = path or whole[-1:]  # the layer itself: ``norm_layers.3.weight``
    if not path:
        return "other"
    if path[-1] not in LEAVES and path[-1] not in SWALLOWING:
        path = [*path[:-1], PARAMETER_ENDING.sub("", path[-1])]
    own = _longest_suffix([*whole[: -len(path)], *path], roles)
    if own:
        return own
    block = _block(path)
    if block in ("attention", "cross") and parameter == "bias" and BLOCKS.get(path[-1]) == block:
        return "buffer"  # an attention has no bias of its own: older GPT-2 and NeoX files hold a causal mask
    role = _leaf(path, block, layered)
    if role.startswith("mlp.") and block == "expert":
        return "expert." + role.removeprefix("mlp.")
    if role.startswith("attention.") and block == "cross":
        return "attention.cross." + role.removeprefix("attention.")
    return role


def _longest_suffix(path: list[str], roles: Mapping[str, str]) -> str | None:
    if not roles:
        return None
    for start in range(len(path)):
        role = roles.get(".".join(path[start:]))
        if role:
            return role
    return None


def _block(path: list[str]) -> str:
    kinds = [BLOCKS[word] for word in path if word in BLOCKS]
    for sovereign in ("expert", "cross"):
        if sovereign in kinds:
            return sovereign
    return kinds[-1] if kinds else ""


def _leaf(path: list[str], block: str, layered: bool) -> str:
    """The role by the last components, in a block."""
    leaf = path[-1]
    if leaf != "norms" and not NORM.search(leaf):
        for word in path:
            if word in SWALLOWING:
                return SWALLOWING[word]
    table = BLOCK_LEAVES["attention" if block == "cross" else block]
    for words in (table, LEAVES):
        for suffix in (".".join(path[-2:]), leaf):
            role = words.get(suffix)
            # ``output`` is a head outside the layers only.
            if role and not (layered and role == "head" and leaf == "output"):
                return role
    if NORM.search(leaf):
        inner = block in ("attention", "cross") and any(INNER_NORM.search(word) for word in path)
        return "attention.norm" if inner else "mixer.norm" if block == "mixer" else "norm"
    if any(SCALE.search(word) for word in path):
        return "scale"
    return "other"
