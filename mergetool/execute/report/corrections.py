"""The section about corrections: how much of its spread every output had lost by merging, and what it has after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergetool.execute.report.depth import AFTER
from mergetool.publish.sections import Cell, Panel, Section, Series, Value, rounded

_PANELS = 6
"""So many roles have a panel of their own, at most."""


def spread_section(ratios: Sequence[Mapping[str, Any]]) -> Section | None:
    """The spread of the merged model's activations over what it should be, before and after; None without any.

    Args:
        ratios: a record for each output and task: ``output`` its name, ``layer`` a number or None, ``role``, ``task``
            what for (or None), ``before`` and ``after`` the ratio of standard deviations, the mean over its units.
    """
    if not ratios:
        return None
    tasks = list(dict.fromkeys(each["task"] for each in ratios))
    roles = list(dict.fromkeys(each["role"] for each in ratios))
    panels = []
    for role in roles[:_PANELS]:
        mine = [each for each in ratios if each["role"] == role]
        layers: list[int | None] = [*sorted({each["layer"] for each in mine if each["layer"] is not None})]
        layers += [None] if any(each["layer"] is None for each in mine) else []
        series = []
        for colour, task in enumerate(tasks):
            of = f"{task}, " if task is not None else ""
            own = [each for each in mine if each["task"] == task]
            series.append(Series(f"{of}before", _means(own, "before", layers), colour, "before"))
            series.append(Series(f"{of}after", _means(own, "after", layers), colour, "after"))
        places = tuple(AFTER if layer is None else str(layer) for layer in layers)
        panels.append(Panel(role, places, tuple(series)))
    rows: list[tuple[Cell, ...]] = [
        (r["output"], r["layer"], r["role"], r["task"], rounded(r["before"]), rounded(r["after"])) for r in ratios
    ]
    before, after = (float(np.mean([each[key] for each in ratios])) for key in ("before", "after"))
    return Section(
        name="spread",
        title="Spread of the merged model's activations",
        found=f"Mean over all outputs: {before:.3f} of the spread they should have as merged, {after:.3f} corrected.",
        reading="The standard deviation of each output of the merged model as a share of what its sources have on the "
        "same data, the mean over units. 1 is as it should be; where models' features do not agree their mean is "
        "smaller, and more so from layer to layer: the variance collapses. Dashed: as merged. Solid: as corrected.",
        warning="Solid curves away from 1: too little data, or factors that met `clamp`. Dashed curves near 0: what "
        "was merged cancels out, and a correction makes noise louder; align the models, or merge fewer layers.",
        x="layer",
        y="share of the spread",
        panels=tuple(panels),
        line=1.0,
        limits=(0.0, 1.05),
        columns=("output", "layer", "role", "task", "before", "after"),
        rows=tuple(rows),
    )


def _means(records: Sequence[Mapping[str, Any]], key: str, layers: Sequence[int | None]) -> tuple[Value, ...]:
    found: dict[int | None, list[float]] = defaultdict(list)
    for each in records:
        found[each["layer"]].append(each[key])
    return tuple(rounded(float(np.mean(found[layer]))) if layer in found else None for layer in layers)
