"""A model that is merged anew at every step, any torch module with its weights put in from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.func import functional_call

from mergetool.errors import CheckpointError, Problem
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.names import Group
from mergetool.execute.train.rows import Row, inputs
from mergetool.facts.dam_merge import Reads, Weights, merged


@dataclass(frozen=True)
class Place:
    """Parameters of a module and what they come from.

    Attributes:
        parameters: their names in the module, each without its tied names.
        names: weights on disk.
        build: makes the parameters of the weights, differentiably, in any dtype; None where one is the other.
    """

    parameters: tuple[str, ...]
    names: tuple[str, ...]
    build: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] | None = None

    def made(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The parameters, of the weights."""
        return tensors if self.build is None else self.build(tensors)


@dataclass(frozen=True)
class Places:
    """Where all parameters of a module come from.

    Attributes:
        places: every parameter once.
        ties: other names of a parameter in the module → the name that it has there.
    """

    places: tuple[Place, ...]
    ties: Mapping[str, str] = field(default_factory=dict)


def same_names(module: torch.nn.Module, names: Sequence[str]) -> Places:
    """The places of parameters that are called on disk as in the module; a tied one by any of its names.

    Args:
        module: the model.
        names: the weights on disk.

    Raises:
        CheckpointError: no weight on disk has a parameter's name.
    """
    present = set(names)
    known: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known.setdefault(id(parameter), []).append(name)
    found, ties, problems = [], {}, []
    for first, *others in known.values():
        stored = next((name for name in (first, *others) if name in present), None)
        if stored is None:
            problems.append(Problem("the module has this parameter, the sources have no weight of that name", first))
        else:
            found.append(Place((first,), (stored,)))
            ties.update(dict.fromkeys(others, first))
    if problems:
        raise CheckpointError(problems)
    return Places(tuple(found), ties)


def places_of(model: Model) -> Places:
    """The places of a model whose parameters are matched with what is on disk, whatever transformers makes of it."""
    found = []
    for group in model.groups:
        if any(map(model.has_parameter, group.parameters)):
            build = None if group.conversion is None else partial(_convert, group, model.module)
            found.append(Place(group.parameters, group.names, build))
    return Places(tuple(found), model.holders)


class _Converted(torch.autograd.Function):  # type: ignore[misc]
    """A conversion only moves entries, so it is undone for gradients; transformers' own leave no graph."""

    @staticmethod
    def forward(ctx: Any, group: Group, module: torch.nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.module = group, module
        made = group.read(dict(zip(group.names, tensors, strict=True)).__getitem__, module)
        return tuple(made[parameter] for parameter in group.parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group: Group = ctx.group
        back = group.undo(dict(zip(group.parameters, gradients, strict=True)), ctx.module)
        return (None, None, *(back[name] for name in group.names))


def _convert(group: Group, module: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    made: Sequence[torch.Tensor] = _Converted.apply(group, module, *tensors)
    return made


def hollow(module: torch.nn.Module) -> torch.nn.Module:
    """Let go of a module's own weights, which others take the place of; ties and buffers stay. Returns the module."""
    empty: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                bare = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                part._parameters[name] = empty.setdefault(id(parameter), bare)
    return module


def run(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], batch: Row, device: torch.device | str) -> Any:
    """The logits of a module with these weights, [rows, ..., V]."""
    output = functional_call(module, dict(weights), (), inputs(batch, device))
    return output if isinstance(output, torch.Tensor) else output.logits


@dataclass(frozen=True)
class Student:
    """A module and what it is merged from.

    Attributes:
        module: called with the rows; its own weights are not used. In evaluation mode, or dropout makes noise.
        places: where its parameters come from, by their names in the module.
        reads: what each weight on disk is made of.
    """

    module: torch.nn.Module
    places: Places
    reads: Mapping[str, Reads]
    _fixed: dict[str, torch.Tensor] = field(default_factory=dict)

    def weights(self, coefficients: Callable[[str], Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Merge every weight, once for any number of forward and backward passes.

        Autograd would keep the gradients of all weights until the forward pass is undone to its beginning. So each
        parameter is a leaf, whose gradient is passed on to the coefficients and dropped as soon as it is complete.

        Args:
            coefficients: the sets of a weight on disk, by its name.
        """
        made = dict(self._fixed)
        for place in self.places.places:
            if place.parameters[0] in made:
                continue
            built = place.made([merged(coefficients(name), self.reads[name]) for name in place.names])
            found = dict(zip(place.parameters, map(_leaf, built), strict=True))
            made |= found
            if not any(self.reads[name].slot.trained for name in place.names):
                self._fixed.update(found)
        return self._with_ties(made)

    def source(self, weights: Weights) -> dict[str, torch.Tensor]:
        """The parameters of one source as it is."""
        made: dict[str, torch.Tensor] = {}
        for place in self.places.places:
            reads = [replace(self.reads[name], sources=(weights,), base=None) for name in place.names]
            built = place.made([next(iter(each)) for each in reads])
            made |= dict(zip(place.parameters, built, strict=True))
        return self._with_ties(made)

    def _with_ties(self, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return made | {other: made[name] for other, name in self.places.ties.items()}

    def logits(self, weights: Mapping[str, torch.Tensor], batch: Row) -> Any:
        """What the model predicts: [rows, ..., V]."""
        return run(self.module, weights, batch, next(iter(self.reads.values())).device)


def _leaf(whole: torch.Tensor) -> torch.Tensor:
    if not whole.requires_grad:
        return whole
    leaf = whole.detach().requires_grad_()
    leaf.register_post_accumulate_grad_hook(partial(_pass_on, whole))
    return leaf


def _pass_on(whole: torch.Tensor, leaf: torch.Tensor) -> None:
    gradient, leaf.grad = leaf.grad, None
    torch.autograd.backward(whole, gradient)
