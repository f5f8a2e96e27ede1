"""The axis that most pictures share: from what comes before the layers through all of them to what comes after."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.anatomy import Part
from mergetool.publish.sections import Value, rounded

BEFORE, AFTER = "in", "out"
"""Places of what comes before all layers, such as embeddings, and after them, such as the last norm and the head."""
_END = re.compile(r"\.(weight|bias)$")


@dataclass(frozen=True)
class Depth:
    """The places of a model's tensors.

    Attributes:
        places: their names, in the order of the model.
        at: tensor → its place.
    """

    places: tuple[str, ...]
    at: Mapping[str, int]

    def means(self, values: Iterable[tuple[str, float, float]]) -> tuple[Value, ...]:
        """The weighted mean at every place; None where there is nothing.

        Args:
            values: a tensor, its value, its weight.
        """
        return self._each(
            values, lambda found: float(np.average(found[0], weights=found[1])) if sum(found[1]) > 0 else float("nan")
        )

    def sums(self, values: Iterable[tuple[str, float, float]]) -> tuple[Value, ...]:
        """The weighted sum at every place; None where there is nothing."""
        return self._each(values, lambda found: float(np.dot(*found)))

    def _each(
        self, values: Iterable[tuple[str, float, float]], look: Callable[[tuple[list[float], list[float]]], float]
    ) -> tuple[Value, ...]:
        lists: list[tuple[list[float], list[float]]] = [([], []) for _ in self.places]
        for name, value, weight in values:
            if name in self.at:
                lists[self.at[name]][0].append(value)
                lists[self.at[name]][1].append(weight)
        return tuple(rounded(look(found)) if found[0] else None for found in lists)

    def only(self, used: Iterable[int]) -> Depth:
        """The same without the places that nothing is said of."""
        kept = sorted(set(used))
        new = {old: place for place, old in enumerate(kept)}
        return Depth(tuple(self.places[i] for i in kept), {n: new[i] for n, i in self.at.items() if i in new})


def depth_of(parts: Mapping[str, Part]) -> Depth:
    """The axis of a model; one without layers has a place for every module."""
    if all(part.layer is None for part in parts.values()):
        modules = list(dict.fromkeys(_END.sub("", name) for name in parts))
        return Depth(tuple(modules), {name: modules.index(_END.sub("", name)) for name in parts})
    stacks = list(dict.fromkeys(part.stack for part in parts.values() if part.layer is not None))
    layers = sorted({(stacks.index(p.stack), p.layer) for p in parts.values() if p.layer is not None})
    short = dict(zip(stacks, names_of(stacks), strict=True))
    named = [f"{short[stacks[stack]]} {layer}".strip() for stack, layer in layers]
    places = (BEFORE, *named, AFTER)
    number = {key: i for i, key in enumerate(layers, 1)}
    at = {
        name: number[stacks.index(part.stack), part.layer]
        if part.layer is not None
        else (0 if part.depth < 0.5 else len(places) - 1)
        for name, part in parts.items()
    }
    return Depth(places, at)


def names_of(stacks: Sequence[str]) -> list[str]:
    """What tells stacks apart: the words of each that not all have; nothing where there is one."""
    words = [stack.split(".") for stack in stacks]
    shared = set(words[0]).intersection(*words[1:]) if words else set()
    return [".".join(word for word in each if word not in shared) for each in words]


def block_places(blocks: Sequence[str]) -> tuple[str, ...]:
    """What blocks are called on the axis: their numbers, and their stacks where there are several."""
    split = [block.rpartition(".") for block in blocks]
    if not all(number.isdigit() for _, _, number in split):
        return tuple(blocks)
    stacks = list(dict.fromkeys(stack for stack, _, _ in split))
    short = dict(zip(stacks, names_of(stacks), strict=True))
    return tuple(f"{short[stack]} {number}".strip() for stack, _, number in split)
