"""The residual stream: one order for everything that reads it and everything that writes to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.anatomy.parts import Anatomy, Part
from mergetool.anatomy.symmetry import Group, Member, Shape
from mergetool.anatomy.symmetry_layouts import positions_are_known, transposed, transposed_experts
from mergetool.errors import PlanError, Problem

_READS = frozenset(
    {"attention.q", "attention.k", "attention.v", "attention.qkv", "mlp.gate", "mlp.up", "mlp.gate_up"}
    | {"expert.gate", "expert.up", "expert.gate_up", "router"}
)
_WRITES = frozenset({"attention.o", "mlp.down", "expert.down"})
_LAST = frozenset({"embedding", "embedding.position", "embedding.segment", "embedding.special", "head.classifier"})
_APART = frozenset({"attention.norm", "buffer", "attention.bias"})


def residual_groups(anatomy: Anatomy, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Iterator[Group]:
    """The one group of a model of one stack.

    Raises:
        PlanError: the model has several stacks or no head, or tensors of which it is not known what they read or write.
    """
    stacks = sorted({part.stack for part in anatomy.parts.values() if part.layer is not None})
    if len(stacks) != 1:
        raise PlanError(
            f"its residual stream is unknown: it has {len(stacks)} stacks of layers: {', '.join(stacks)}",
            fix="leave residual out of align.groups",
        )
    if not anatomy.tied and not any(part.role in ("head", "head.classifier") for part in anatomy.parts.values()):
        what = "the residual stream is its output, which must stay as it is: the model has no head"
        raise PlanError(what, fix="leave residual out of align.groups")
    _check_positions(anatomy, config)
    size = _width(anatomy, shapes)
    members, problems = [], []
    for name, part in anatomy.parts.items():
        axes = _axes(name, part, config, shapes[name], size)
        if axes is None:
            what = f"its residual stream is unknown: {name} {list(shapes[name])}, which is {part.role!r}"
            problems.append(Problem(what, fix="leave residual out of align.groups"))
            continue
        members += [Member(name, axis, 1, 0, size, role=part.role) for axis in axes]
    if problems:
        raise PlanError(problems[:5])
    yield Group("residual", "residual", size, tuple(members))


def _check_positions(anatomy: Anatomy, config: Mapping[str, Any]) -> None:
    """Sinusoids that are computed and added to the stream give its dimensions an order, and leave no tensor."""
    roles = {part.role for part in anatomy.parts.values()}
    if {"embedding.position", "attention.bias"} & roles or anatomy.family in ("llama", "moe"):
        return
    if not positions_are_known(config) and any(role.startswith("attention.") for role in roles):
        raise PlanError(
            "its residual stream is unknown: neither tensors nor config say how it knows positions",
            fix="leave residual out of align.groups",
        )


def _width(anatomy: Anatomy, shapes: Mapping[str, Shape]) -> int:
    """The width of the stream: that of the norms on it."""
    found = {shapes[name][0] for name, part in anatomy.parts.items() if part.role == "norm" and len(shapes[name]) == 1}
    if len(found) != 1:
        listed = ", ".join(map(str, sorted(found))) or "none"
        raise PlanError(
            f"its residual stream is unknown: the widths of its norms are {listed}",
            fix="leave residual out of align.groups",
        )
    return found.pop()


def _axes(name: str, part: Part, config: Mapping[str, Any], shape: Shape, size: int) -> tuple[int, ...] | None:
    """The axes of a tensor that run along the stream; None where that is not known."""
    role = part.role.replace("attention.cross.", "attention.")
    if role in _APART:
        return ()
    if len(shape) == 1 and (role in _READS or role == "head.classifier" or part.vocabulary_axis == 0):
        return ()  # a bias of what is read, or of the output
    if role in _READS or role in _WRITES:
        axes = _matrix_axes(role, config, shape)
    elif role in ("norm", "scale") and len(shape) == 1:
        axes = (0,)
    elif role in _LAST or role == "head":
        axes = (len(shape) - 1,) if len(shape) > 1 or role == "embedding.special" else None
    elif role == "embedding.patch":
        axes = (0,)
    elif role == "head.transform":
        # Whatever reads it reads it in the same order: the tied embeddings, or a classifier.
        axes = tuple(range(len(shape))) if len(shape) <= 2 else None
    else:
        axes = None
    return axes if axes is not None and all(shape[axis] == size for axis in axes) else None


def _matrix_axes(role: str, config: Mapping[str, Any], shape: Shape) -> tuple[int, ...] | None:
    writes = role in _WRITES
    if len(shape) == 1:
        return (0,)
    if len(shape) == 2 and role.startswith("expert.") and transposed_experts(config):
        return (1,) if writes else ()  # the biases of all experts
    if len(shape) == 2:
        return (int(writes == transposed(config)),)
    if len(shape) == 3:
        return (1 + int(writes == transposed_experts(config)),)
    return None
