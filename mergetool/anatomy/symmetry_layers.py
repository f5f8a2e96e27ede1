"""The tensors of one layer by role, with the shapes that a symmetry counts on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mergetool.anatomy.parts import Anatomy
from mergetool.anatomy.symmetry import Shape
from mergetool.anatomy.symmetry_layouts import config_of
from mergetool.errors import PlanError

# A norm over what lies between two matrices of one block, although its name has no place inside them.
INNER_NORM = re.compile(r"(^|[._])((sub|inner)_?(norm|ln|layer_?norm)|ffn_layernorm|inner_attn_ln|attn_ln)([._]|$)")

_IN_MLP = re.compile(r"(^|[._])(mlp|ffn|feed_forward|experts?|moe)([._]|$)")


@dataclass(frozen=True)
class Layer:
    """One layer of one stack.

    Attributes:
        name: the stack and the layer's number.
        config: the part of the config that speaks of it.
        shapes: of every tensor of the model.
        roles: role → names on disk.
        experts: name → number of its expert, where it has one.
        pinned: whether the stack adds a bias of its own for each head to the attention's scores.
    """

    name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    roles: Mapping[str, tuple[str, ...]]
    experts: Mapping[str, int]
    pinned: bool

    def of(self, role: str) -> tuple[str, ...]:
        """The names with this role."""
        return self.roles.get(role, ())

    def inside(self, mlp: bool) -> tuple[str, ...]:
        """Names whose place in an MLP, or else in an attention, is not known: they bind its units to their order."""
        between = (name for name in (*self.of("norm"), *self.of("other")) if INNER_NORM.search(name))
        others = (name for name in self.of("other") if math.prod(self.shapes[name]) > 1)
        return tuple(name for name in dict.fromkeys((*between, *others)) if bool(_IN_MLP.search(name)) == mlp)

    def matrix(self, names: Iterable[str], role: str) -> Linear | None:
        """The matrix and the bias among ``names``; None where there is neither.

        Raises:
            PlanError: there are several, or tensors of another number of axes.
        """
        every = tuple(names)
        if not every:
            return None
        matrices = [name for name in every if len(self.shapes[name]) == 2]
        vectors = [name for name in every if len(self.shapes[name]) == 1]
        if len(matrices) != 1 or len(vectors) > 1 or len(matrices) + len(vectors) < len(every):
            listed = ", ".join(f"{name} {list(self.shapes[name])}" for name in every[:4])
            unknown(f"{role} should be one matrix with at most one bias, and is {listed}", self.name)
        return Linear(matrices[0], vectors[0] if vectors else None)


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix and its bias."""

    weight: str
    bias: str | None


def unknown(what: str, where: str, kinds: str = "") -> NoReturn:
    """Say what of a model is not known.

    Raises:
        PlanError: always.
    """
    leave = f"leave {kinds} out of align.groups" if kinds else "leave such groups out of align.groups"
    raise PlanError(f"its symmetries are unknown: {what}", where, f"{leave}, or merge without align")


def layers_of(anatomy: Anatomy, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[Layer]:
    """Every layer of every stack, in order of names on disk."""
    found: dict[tuple[str, int], dict[str, list[str]]] = {}
    pinned = set()
    for name, part in anatomy.parts.items():
        if part.role.endswith("attention.bias") and len(shapes[name]) > 1:
            pinned.add(part.stack)
        if part.layer is not None:
            found.setdefault((part.stack, part.layer), {}).setdefault(part.role, []).append(name)
    experts = {name: part.expert for name, part in anatomy.parts.items() if part.expert is not None}
    return [
        Layer(
            f"{stack}.{number}".removeprefix("."),
            config_of(config, stack),
            shapes,
            {role: tuple(sorted(names)) for role, names in roles.items()},
            experts,
            stack in pinned,
        )
        for (stack, number), roles in sorted(found.items())
    ]
