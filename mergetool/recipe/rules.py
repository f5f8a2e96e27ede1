"""Which tensors a rule of the recipe is for, and what it says about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING

from mergetool.recipe.settings import Setting
from mergetool.recipe.tree import Path

if TYPE_CHECKING:
    from mergetool.anatomy import Part


@dataclass(frozen=True)
class Where:
    """Which tensors: all that is said must hold, and of each list one entry."""

    part: tuple[str, ...] | None = None
    """Roles or groups of roles."""
    layers: tuple[tuple[int, int], ...] | None = None
    """Ranges, both ends included; negative numbers count from the end."""
    name: tuple[str, ...] | None = None
    """Globs on the whole name."""

    def matches(self, name: str, part: Part) -> bool:
        """Whether a tensor of this name, which is this part of its model, is meant."""
        from mergetool.anatomy import matches_role

        return (
            (self.name is None or any(fnmatchcase(name, glob) for glob in self.name))
            and (self.layers is None or in_layers(self.layers, part.layer, part.layers))
            and (self.part is None or any(matches_role(part.role, role) for role in self.part))
        )


def in_layers(spans: tuple[tuple[int, int], ...], layer: int | None, count: int) -> bool:
    """Whether a layer of a stack of ``count`` lies in one of the ranges; a tensor of no layer lies in none."""
    if layer is None:
        return False
    ends = ((first + count * (first < 0), last + count * (last < 0)) for first, last in spans)
    return any(first <= layer <= last for first, last in ends)


@dataclass(frozen=True)
class Rule:
    """Another treatment for some tensors."""

    index: int
    where: Where
    merge_method: str | None = None
    """Another method; None: the recipe's."""
    parameters: Mapping[str, Setting] | None = None
    models: Mapping[str, Mapping[str, Setting]] | None = None
    """Parameters of single sources, by the source's reference."""
    keep: str | None = None
    """The source whose tensors are copied."""
    drop: bool = False

    @cached_property
    def positions(self) -> dict[str, int]:
        """The index of every model under the rule by its reference."""
        return {reference: i for i, reference in enumerate(self.models or ())}

    @property
    def title(self) -> str:
        """The rule in words, counted from 1 as people and messages count."""
        return f"rule {self.index + 1}"

    @property
    def path(self) -> Path:
        """Where the rule stands in the recipe."""
        return ("rules", self.index)
