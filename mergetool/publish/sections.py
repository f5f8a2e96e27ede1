"""What a report shows, as plain data: sections with their text, the curves of their picture, and the numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergetool.errors import CheckpointError

FORMAT = 1
"""Raised when the keys of ``report.json`` change their meaning."""
DIGITS = 6
"""Significant digits of a number: the rest differs between machines and is seen by nobody."""
Value = float | None
Cell = str | int | float | None


@dataclass(frozen=True)
class Series:
    """One curve of a panel.

    Attributes:
        name: what the legend calls it.
        values: one for each place of the panel; None where there is none.
        colour: curves of one colour speak of the same thing.
        style: ``before`` is what something was and ``after`` what became of it, ``total`` is of all the others
            together, ``points`` and ``hollow`` are joined by no line; ``plain`` is none of these.
        bands: ranges around the curve, the widest first, each with a lower and an upper bound for every place.
    """

    name: str
    values: tuple[Value, ...]
    colour: int = 0
    style: Literal["plain", "before", "after", "total", "points", "hollow"] = "plain"
    bands: tuple[tuple[tuple[Value, Value], ...], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: what sets it apart from the other panels.
        places: what the horizontal axis runs over: names at equal distances, or numbers.
        series: the curves.
        marks: places with a vertical line, and what it says.
    """

    title: str
    places: tuple[str, ...] | tuple[float, ...]
    series: tuple[Series, ...]
    marks: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """One picture with what there is to say about it.

    Attributes:
        name: what its file is called.
        title: its heading.
        found: what the picture shows, with the figures that matter.
        reading: how to read it.
        warning: what would be a bad sign.
        x: the horizontal axis, with its unit.
        y: the vertical axis, with its unit; of a heat map what its colours say.
        panels: what is drawn, side by side.
        kind: curves, or a heat map whose rows are the series of each panel.
        scale: of the vertical axis.
        line: a level that is marked.
        limits: the least span of the vertical axis; it is never cut.
        columns: the heading of :attr:`rows`.
        rows: the numbers, in full.
    """

    name: str
    title: str
    found: str
    reading: str
    warning: str
    x: str
    y: str
    panels: tuple[Panel, ...]
    kind: Literal["curves", "heat"] = "curves"
    scale: Literal["linear", "log"] = "linear"
    line: float | None = None
    limits: tuple[float, float] | None = None
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()


def rounded(value: float) -> Value:
    """A number as a report holds it; None for what is not finite."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def numbers(values: Iterable[float]) -> tuple[Value, ...]:
    """Numbers as a report holds them."""
    return tuple(rounded(float(value)) for value in values)


def as_json(sections: Sequence[Section]) -> dict[str, Any]:
    """The content of ``report.json``; keys are only ever added."""
    return {"format": FORMAT, "sections": [dataclasses.asdict(section) for section in sections]}


def from_json(data: Any, where: str) -> tuple[Section, ...]:
    """The sections of a ``report.json``.

    Args:
        data: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: it is no report, or one of another format.
    """
    try:
        if data["format"] != FORMAT:
            raise CheckpointError(f"is a report of format {data['format']}, and {FORMAT} is known here", where)
        return tuple(_section(each) for each in data["sections"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"is no report: {error}", where) from error


def _section(data: Mapping[str, Any]) -> Section:
    found = {key: _tuples(value) for key, value in data.items()}
    return Section(**{**found, "panels": tuple(_panel(each) for each in data["panels"])})


def _panel(data: Mapping[str, Any]) -> Panel:
    series = tuple(Series(**{key: _tuples(value) for key, value in each.items()}) for each in data["series"])
    return Panel(data["title"], _tuples(data["places"]), series, _tuples(data["marks"]))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
