"""Numbers, spreads, marks and tables as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

NONE = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all but its first column are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    assert all(len(line) == len(head) for line in lines), "a row of another length"
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None) -> str:
    """Three digits, or a dash where there is none."""
    if value is None:
        return NONE
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def values(costs: Sequence[Mapping[str, float]] | None, *keys: str) -> list[float]:
    """The sum of these keys in each cost that has them all."""
    return [sum(cost[key] for key in keys) for cost in costs or () if all(key in cost for key in keys)]


def median(costs: Sequence[Mapping[str, float]] | None, *keys: str) -> float | None:
    """The median of the sum of these keys; None where no cost has them."""
    found = values(costs, *keys)
    return statistics.median(found) if found else None


def spread(costs: Sequence[Mapping[str, float]] | None, *keys: str) -> str:
    """The median, and where there are several the least and the most: ``4.00 (3.95–4.43)``."""
    found = values(costs, *keys)
    if not found:
        return NONE
    middle = number(statistics.median(found))
    return middle if len(found) == 1 else f"{middle} ({number(min(found))}–{number(max(found))})"


def ratio(above: float | None, below: float | None) -> float | None:
    """One divided by the other, where there are both."""
    return above / below if above is not None and below else None


def gigabytes(megabytes: float | None) -> str:
    """Megabytes as gigabytes."""
    return NONE if megabytes is None else number(megabytes / 1e3)


def mark(value: float | None, least: float | None = None, most: float | None = None) -> str:
    """Whether a value is within its target, bounds included."""
    if value is None or (least is None and most is None):
        return NONE
    met = (least is None or value >= least) and (most is None or value <= most)
    return "met" if met else "**not met**"
