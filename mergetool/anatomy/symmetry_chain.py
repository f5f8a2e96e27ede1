"""Hidden units and channels of plain networks: matrices and convolutions that feed one another in a line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from mergetool.anatomy.parts import Anatomy
from mergetool.anatomy.symmetry import Group, Member, Shape
from mergetool.errors import PlanError

_FIRST = re.compile(r"^(input|inp|stem|embed|first)", re.IGNORECASE)
_LAST = re.compile(r"^(head|output|out|classifier|last|logits|final)", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+)")
_FIX = "align knows networks whose layers feed one another in a line; merge this one without align"


@dataclass(frozen=True, slots=True)
class _Module:
    """Tensors with a common prefix: ``axes`` are those of its weight, 1 for a norm."""

    name: str
    axes: int
    outputs: int
    inputs: int
    tensors: tuple[str, ...]


def chain_groups(anatomy: Anatomy, shapes: Mapping[str, Shape]) -> Iterator[Group]:
    """One group for what lies between each two neighbours of the line.

    Raises:
        PlanError: the tensors are not those of matrices, convolutions and norms in one line.
    """
    modules = list(_modules(shapes))
    line = sorted((module for module in modules if module.axes > 1), key=lambda module: _place(module, anatomy))
    norms = [(module, _owner(module, line)) for module in modules if module.axes == 1]
    for here, after in pairwise(line):
        if after.inputs % here.outputs or (after.inputs != here.outputs and (here.axes, after.axes) != (4, 2)):
            what = f"{after.name} reads {after.inputs} numbers and {here.name} before it makes {here.outputs}"
            raise PlanError(f"its symmetries are unknown: {what}", fix=_FIX)
        if here.outputs > 1:
            members = [*_outputs(here, [norm for norm, owner in norms if owner == here], shapes)]
            weight = next(name for name in after.tensors if len(shapes[name]) > 1)
            block = after.inputs // here.outputs
            members.append(Member(weight, 1, block, 0, after.inputs, role="input"))
            yield Group(f"{here.name}.units", "units", here.outputs, tuple(members))


def _modules(shapes: Mapping[str, Shape]) -> Iterator[_Module]:
    found: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if shape:  # a count of batches has no axes
            found.setdefault(name.rpartition(".")[0], []).append(name)
    for prefix, names in found.items():
        weights = [name for name in names if len(shapes[name]) > 1]
        others = [shapes[name] for name in names if len(shapes[name]) == 1]
        outputs = shapes[weights[0]][0] if weights else others[0][0]
        if len(weights) > 1 or any(shape != (outputs,) for shape in others) or not prefix:
            raise PlanError(f"its symmetries are unknown: {', '.join(names[:4])}", fix=_FIX)
        axes = len(shapes[weights[0]]) if weights else 1
        if axes not in (1, 2, 3, 4, 5):
            raise PlanError(f"its symmetries are unknown: {weights[0]} has {axes} axes", fix=_FIX)
        inputs = shapes[weights[0]][1] if weights else outputs
        yield _Module(prefix, axes, outputs, inputs, tuple(sorted(names)))


def _place(module: _Module, anatomy: Anatomy) -> tuple[object, ...]:
    """Convolutions come before matrices, numbers count, and what is called a head comes last."""
    head = any(anatomy.parts[name].role.startswith("head") for name in module.tensors)
    words = module.name.split(".")
    rank = 1 if head or any(map(_LAST.match, words)) else -1 if any(map(_FIRST.match, words)) else 0
    if rank == 1 and module.name.rpartition(".")[2].isdigit():
        rank = 0  # members of a sequence that is called a classifier
    natural = tuple((int(piece), "") if piece.isdigit() else (-1, piece) for piece in _NUMBER.split(module.name))
    return (module.axes == 2, rank, natural)


def _owner(norm: _Module, line: list[_Module]) -> _Module:
    """The matrix or convolution whose outputs a norm goes over."""
    parent, number = norm.name.rpartition(".")[0], _number(norm)
    fitting = [module for module in line if module.outputs == norm.outputs]
    beside = [module for module in fitting if module.name.rpartition(".")[0] == parent] or fitting
    before = [module for module in beside if _number(module) <= number] if number >= 0 else beside
    nearest = [module for module in before if _number(module) == max(map(_number, before))]
    if len(nearest) != 1:
        which = " or ".join(module.name for module in nearest) or "nothing of its width"
        raise PlanError(f"its symmetries are unknown: the norm {norm.name} goes over {which}", fix=_FIX)
    if nearest[0].axes > 2 and not any(name.endswith("running_var") for name in norm.tensors):
        what = f"{norm.name} has no running statistics, and a GroupNorm binds neighbouring channels"
        raise PlanError(f"its symmetries are unknown: {what}", fix=_FIX)
    return nearest[0]


def _number(module: _Module) -> int:
    found = _NUMBER.findall(module.name.rpartition(".")[2])
    return int(found[-1]) if found else -1


def _outputs(module: _Module, norms: list[_Module], shapes: Mapping[str, Shape]) -> Iterator[Member]:
    for owner in (module, *norms):
        for name in owner.tensors:
            role = "output" if len(shapes[name]) > 1 else "bias" if owner is module else "norm"
            yield Member(name, 0, 1, 0, module.outputs, role=role)
