"""The plots: bars, one group for each piece of work. Needs the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .markdown import median
from .workers import COUNTS

Series = Sequence[tuple[str, Sequence[float | None]]]
"""For each colour its label, and one value for each group."""


def plots(sections: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw what there are numbers for; the files made."""
    made = []
    if "compare" in sections:
        costs = sections["compare"]["costs"]
        keys = (("mergekit", "wall_s"), ("mergetool", "wall_s"), ("floor", "engine_s"))
        series = [(who, [median(found.get(who), key) for found in costs.values()]) for who, key in keys]
        title = "seconds, whole process (logarithmic)"
        made.append(bars(list(costs), series, title, folder / "benchmarks.png", logarithmic=True))
    if "workers" in sections:
        costs = sections["workers"]["costs"]
        series = [(f"workers: {n}", [median(found.get(n), "engine_s") for found in costs.values()]) for n in COUNTS]
        made.append(bars(list(costs), series, "engine seconds", folder / "benchmarks-workers.png"))
    return made


def bars(groups: Sequence[str], series: Series, title: str, path: Path, logarithmic: bool = False) -> Path:
    """Draw horizontal bars; where a value is missing there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = [(label, given) for label, given in series if any(x is not None for x in given)]
    figure, axes = pyplot.subplots(figsize=(8, 0.7 * len(groups) + 1))
    width = 0.81 / len(series)
    for i, (label, given) in enumerate(series):
        here = [(row + (i - (len(series) - 1) / 2) * width, x) for row, x in enumerate(given) if x is not None]
        drawn = axes.barh([place for place, _ in here], [x for _, x in here], 0.93 * width, label=label)
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
