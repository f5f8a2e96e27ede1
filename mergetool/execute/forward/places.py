"""Where in a network each tensor on disk is used, and so what its inputs and outputs are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from mergetool.execute.forward.model import Model
from mergetool.execute.forward.names import Group

Kind = Literal["linear", "conv", "embedding", "norm", "stack"]
_CONVS = (torch.nn.Conv1d, torch.nn.Conv2d)


@dataclass(frozen=True)
class Place:
    """A module and the tensors it computes with.

    Attributes:
        path: where the module is.
        module: it.
        attribute: the name of its parameter.
        kind: how it uses it. A ``stack`` is a parameter ``[experts, ...]`` whose experts are used one by one.
        names: for each expert, or once, the names on disk that share an input; one name is all experts' where it
            is :attr:`fused`.
        widths: how many of the output's channels each of these names makes; empty where that is not known.
        fused: whether a tensor on disk holds all experts.
    """

    path: str
    module: torch.nn.Module
    attribute: str
    kind: Kind
    names: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    fused: bool = False

    @property
    def every(self) -> frozenset[str]:
        """All its names on disk."""
        return frozenset(name for names in self.names for name in names)

    @property
    def has_input(self) -> bool:
        """Whether it multiplies what goes in by a matrix."""
        if isinstance(self.module, _CONVS):
            known = self.module.padding_mode == "zeros" and self.module.padding != "same"
            return bool(known and self.module.groups == 1)
        return self.kind in ("linear", "stack")


def places(model: Model) -> tuple[Place, ...]:
    """Every place where a tensor is used by a module that does nothing else."""
    found = []
    for path, module in model.module.named_modules():
        for attribute, kind in _kinds(module):
            name = f"{path}.{attribute}" if path else attribute
            group = model.group_of(name)
            found.append(_place(model, path, module, attribute, kind, group))
    return tuple(found)


def _kinds(module: torch.nn.Module) -> Iterator[tuple[str, Kind]]:
    """The parameters of a module by which it is known, and how it uses them."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    stacks = [name for name, p in parameters.items() if p.ndim == 3 and len(p) > 1]
    weight = parameters.get("weight")
    if isinstance(module, _CONVS):
        yield "weight", "conv"
    elif stacks:
        yield from ((name, "stack") for name in stacks)
    elif weight is None or next(module.children(), None) is not None:
        return
    elif isinstance(module, torch.nn.Embedding):
        yield "weight", "embedding"
    elif weight.ndim == 2:
        yield "weight", "linear"
    elif weight.ndim == 1:
        yield "weight", "norm"


def _place(model: Model, path: str, module: torch.nn.Module, attribute: str, kind: Kind, group: Group) -> Place:
    shapes = model.weights.shapes
    if group.conversion is None or len(group.parameters) > 1:
        # Where one tensor becomes several parameters, each of them shows its input and none its output.
        widths: tuple[int, ...] = () if group.conversion is not None else (_width(module, attribute, kind),)
        return Place(path, module, attribute, kind, (group.names,), widths, fused=kind == "stack")
    experts = module._parameters[attribute].shape[0] if kind == "stack" else 1
    lists = list(group.tensors.values())
    if kind == "stack" and all(len(names) == experts for names in lists):
        names = tuple(zip(*lists, strict=True))
        return Place(path, module, attribute, kind, names, tuple(shapes[name][0] for name in names[0]))
    together = tuple(name for names in lists for name in names)
    axis = -2 if kind == "stack" else 0
    widths = tuple(shapes[name][axis] if len(shapes[name]) > 1 else 0 for name in together)
    return Place(path, module, attribute, kind, (together,), widths, fused=kind == "stack")


def _width(module: torch.nn.Module, attribute: str, kind: Kind) -> int:
    """How many channels come out of a module; 0 where only running it tells."""
    weight = module._parameters[attribute]
    assert weight is not None  # it was found there
    if kind in ("stack", "norm"):
        return 0
    return int(weight.shape[1 if kind == "embedding" or is_transposed(module) else 0])


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether its weights are ``[in, out]``: GPT-2's linear layer, or experts that transformers says so of."""
    stated = getattr(module, "is_transposed", None) is True
    return stated or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))
