"""The section about what the sources compute: how alike the features of every two of them are, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mergetool.execute.fact_folder import Facts
from mergetool.execute.report.depth import block_places
from mergetool.publish.sections import Cell, Panel, Section, Series, rounded

FIELD = "output.cka"
"""What is kept of the outputs of a block of two models."""
_LETTERS = 21
"""Letters of a model's name in a pair, at most."""
_CURVES = 8
"""Of more pairs than this a heat map is drawn."""


def likeness_section(pairs: Mapping[tuple[str, str], Facts]) -> Section:
    """The CKA of every pair in every block.

    Args:
        pairs: what was measured, by the names of the two.
    """
    blocks = [key.removesuffix(f":{FIELD}") for key in next(iter(pairs.values())).entries if key.endswith(FIELD)]
    found = {pair: [rounded(float(facts.get(block, FIELD))) for block in blocks] for pair, facts in pairs.items()}
    places = block_places(blocks)
    series = tuple(
        Series(f"{_short(first)} · {_short(second)}", tuple(values), colour)
        for colour, ((first, second), values) in enumerate(found.items())
    )
    rows: list[tuple[Cell, ...]] = [
        (*pair, block, value) for pair, values in found.items() for block, value in zip(blocks, values, strict=True)
    ]
    heat = len(pairs) > _CURVES
    low = min((value for values in found.values() for value in values if value is not None), default=0.0)
    parts = 20 if low < 0.95 else 200
    count = max(float(facts.get(blocks[0], "output.count")) for facts in pairs.values())
    return Section(
        name="cka",
        title="How alike the models' features are",
        found=_said(found, places, count),
        reading="CKA of what every layer puts out, on the same data for both models: 1 for features that are equal up "
        "to a rotation and a scale, about 0 for unrelated ones. It asks what two models compute and not in which order "
        "their units lie, so it is the same before and after alignment. Fine-tunes of one base start at 1 and lose "
        "likeness with every step of training; models of different starts may still be alike.",
        warning="A curve that falls from layer to layer, or far below the others: these two solve their tasks by "
        "different features, and averaging their weights mixes what does not belong together. Merge checkpoints from "
        "earlier in their training, train on a mixture, or keep the layers of one model where they differ most.",
        x="layer",
        y="CKA",
        panels=(Panel("", places, series),),
        kind="heat" if heat else "curves",
        # Among fine-tunes all lies near 1, and from 0 to 1 nothing could be told apart.
        limits=(min(low, 1.0), 1.0) if heat else (max(0.0, float(np.floor(low * parts) / parts)), 1.0),
        columns=("first", "second", "block", "CKA"),
        rows=tuple(rows),
    )


def _short(name: str) -> str:
    """A model's name where two have to stand side by side: what tells models apart is at the beginning or the end."""
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[:half]}…{name[-half:]}"


def _said(found: Mapping[tuple[str, str], list[float | None]], places: tuple[str, ...], count: float) -> str:
    known = [(value, pair, place) for pair, each in found.items() for value, place in zip(each, places, strict=True)]
    numbers = [(value, pair, place) for value, pair, place in known if value is not None]
    if not numbers:
        return "Nothing could be measured."
    least, (first, second), place = min(numbers)
    mean = sum(value for value, _, _ in numbers) / len(numbers)
    return (
        f"Mean {mean:.3f}; least {least:.3f}, of {first} and {second} in layer {place}. On {count:,.0f} tokens or rows."
    )
