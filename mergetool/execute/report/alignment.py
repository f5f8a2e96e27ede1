"""The section about alignment: how well units matched as they lay and as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mergetool.execute.aligned import Aligned
from mergetool.execute.report.depth import Depth
from mergetool.publish.sections import Cell, Panel, Section, Series, rounded

_WHOLE = "whole model"
"""The place of groups that run through all layers."""
_CHANCE = "0 what chance gives"
_SCORES = {
    "weight_matching": ("their weights", _CHANCE),
    "correlation": ("the correlation of their activations", _CHANCE),
    "inner_product": (
        "the inner products of their activations",
        "0 what units have that are never active together; activations of one sign match in part by chance",
    ),
}
"""What units are compared by, and what a score of 0 means."""
_KINDS = {
    "mlp": "hidden units of MLPs",
    "heads": "attention heads",
    "vo": "values and outputs of heads",
    "experts": "experts",
    "residual": "residual stream",
    "units": "hidden units",
}


def alignment_section(aligned: Mapping[str, Aligned], reference: str, depth: Depth) -> Section:
    """What turning every source gained, by kind of unit and layer.

    Args:
        aligned: what was found, by the source's name.
        reference: the name of the model that they face.
        depth: the places of the models' tensors.
    """
    found = next(iter(aligned.values()))
    how = found.facts.made_of["align"]
    by, nothing = _SCORES[how["score"] if how["method"] == "activation_matching" else how["method"]]
    places = {group.name: _place(group.tensors, depth) for group in found.groups}
    kinds = dict.fromkeys(group.kind for group in found.groups)
    kind_of = {group.name: group.kind for group in found.groups}
    panels = tuple(_panel(kind, kind_of, places, aligned, depth) for kind in kinds)
    rows: list[tuple[Cell, ...]] = [
        (source, m.group, kind_of[m.group], m.size, rounded(m.identity), rounded(m.found), rounded(m.moved))
        for source, each in aligned.items()
        for m in each.matches
    ]
    return Section(
        name="alignment",
        title="Alignment: what turning the models gained",
        found=_found(aligned, reference),
        reading=f"Units are compared by {by}. 1 is a perfect match of units with those of {reference}, {nothing}. "
        "Dashed: units as they lie in the file. Solid: units in the order in which they are merged. Several groups of "
        "one layer are averaged by their size.",
        warning="Solid curves near 0: nothing was found that belongs together, and the average of such units is "
        "noise. Dashed curves near 1: the models had one order from the start, and alignment was not needed.",
        x="layer",
        y="share of a perfect match",
        panels=panels,
        limits=(0.0, 1.0),
        columns=("source", "group", "kind", "units", "as they lie", "turned", "share that moved"),
        rows=tuple(rows),
    )


def _place(tensors: Sequence[str], depth: Depth) -> str:
    at = {depth.at[name] for name in tensors if name in depth.at}
    return depth.places[at.pop()] if len(at) == 1 else _WHOLE


def _panel(
    kind: str, kind_of: Mapping[str, str], places: Mapping[str, str], aligned: Mapping[str, Aligned], depth: Depth
) -> Panel:
    mine = {name: place for name, place in places.items() if kind_of[name] == kind}
    shown = [place for place in (*depth.places, _WHOLE) if place in mine.values()]
    local = Depth(tuple(shown), {name: shown.index(place) for name, place in mine.items()})
    series = []
    for colour, (source, each) in enumerate(aligned.items()):
        before = [(m.group, m.identity, m.size) for m in each.matches]
        after = [(m.group, m.found, m.size) for m in each.matches]
        series.append(Series(f"{source}, as it lies", local.means(before), colour, "before"))
        series.append(Series(f"{source}, turned", local.means(after), colour, "after"))
    return Panel(_KINDS.get(kind, kind), local.places, tuple(series))


def _found(aligned: Mapping[str, Aligned], reference: str) -> str:
    said = []
    for source, each in aligned.items():
        sizes = [match.size for match in each.matches]
        if not any(sizes):
            continue
        before, after, moved = (
            float(np.average([getattr(match, name) for match in each.matches], weights=sizes))
            for name in ("identity", "found", "moved")
        )
        gained = f"from {before:.3f} to {after:.3f} of a perfect match, {moved:.0%} of its units moved"
        said.append(f"{source}: {gained if each.moved else f'in the order of {reference} already, {before:.3f}'}")
    return "; ".join(said) + "."
