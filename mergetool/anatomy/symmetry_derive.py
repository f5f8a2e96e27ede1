"""From the parts of a model to all groups of units that may change places without changing its function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from mergetool.anatomy.parts import Anatomy
from mergetool.anatomy.symmetry import Group, Shape
from mergetool.anatomy.symmetry_attention import attention_groups
from mergetool.anatomy.symmetry_chain import chain_groups
from mergetool.anatomy.symmetry_layers import Layer, layers_of
from mergetool.anatomy.symmetry_mlp import expert_groups, mlp_groups
from mergetool.anatomy.symmetry_residual import residual_groups
from mergetool.errors import PlanError, Problem

DEFAULT_KINDS = ("mlp", "heads", "vo", "experts")
"""What is aligned if nothing else is asked for: never the residual stream."""
_MOST_PROBLEMS = 5


def symmetries(
    anatomy: Anatomy,
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    kinds: Collection[str] = DEFAULT_KINDS,
) -> tuple[Group, ...]:
    """Every group of the wanted kinds; groups inside units of others follow them.

    Args:
        anatomy: what each tensor is.
        config: the model's ``config.json``; may be empty for a plain network.
        shapes: name → shape of every tensor on disk.
        kinds: of :class:`Group`. ``mlp`` also stands for the hidden units of plain networks.

    Raises:
        PlanError: the symmetries of a wanted kind are not known; says of which tensors.
    """
    layers = layers_of(anatomy, config, shapes)
    if not any(_is_block(layer) for layer in layers):
        return tuple(chain_groups(anatomy, shapes)) if {"mlp", "units"} & set(kinds) else ()
    problems: list[Problem] = []
    groups: list[Group] = []

    def collect(make: Callable[[], Iterator[Group]]) -> None:
        try:
            groups.extend(make())
        except PlanError as error:
            problems.extend(error.problems)

    for layer in layers:
        for make in _MAKERS:
            collect(lambda layer=layer, make=make: make(layer, kinds))  # type: ignore[misc]
    if "residual" in kinds:
        collect(lambda: residual_groups(anatomy, config, shapes))
    if problems:
        raise PlanError(problems[:_MOST_PROBLEMS])
    return tuple(groups)


def _cross_groups(layer: Layer, kinds: Collection[str]) -> Iterator[Group]:
    return attention_groups(layer, kinds, "attention.cross.")


_MAKERS = (mlp_groups, expert_groups, attention_groups, _cross_groups)


def _is_block(layer: Layer) -> bool:
    """Whether a layer has a block of a transformer, rather than being one matrix of a plain network."""
    return any(role.startswith(("attention.", "mlp.down", "expert.", "mixer.")) for role in layer.roles)
