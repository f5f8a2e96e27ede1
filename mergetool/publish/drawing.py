"""Sections drawn as PNG pictures with matplotlib, which nothing else imports; the same section gives the same bytes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergetool.publish.sections import Panel, Section, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8A8A8A")
"""Told apart by the colour-blind too: those of Okabe and Ito, the yellow one left out, which white swallows."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""What goes with each colour, for print without any."""
_DASHES: tuple[Any, ...] = ("-", (0, (6, 1.5)), "-.", ":")
"""What sets a curve apart from the one that had its colour before, where there are more curves than colours."""
_TOTAL = "#000000"
_WIDTH, _HEIGHT, _DPI = 10.0, 3.1, 120
"""Inches of a picture and of a row of panels; dots an inch: 1200 px across."""
_MARKED = 40
"""Curves of more places have no markers: they would run together."""
_TICKS = 26
"""So many places are named on the axis of one panel across the whole picture, at most."""
_LABELLED = 12
"""Heat maps of more places have no figures in their fields."""
_LETTER, _LINE = 0.074, 0.62
"""Inches of a letter of the legend, and of the line that stands before it."""
_LONGEST = 46
"""Letters of a name; of a longer one the middle is left out."""
_STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Of the layers every so many-th is named."""


def draw(section: Section) -> bytes:
    """A section's picture.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that the font lacks a letter of a model's name
        matplotlib.rcdefaults()  # what the user has set for pictures of his own would make other bytes
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, _height(section)), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        (_heat if section.kind == "heat" else _curves)(section, figure)
        made = io.BytesIO()
        figure.savefig(made, format="png", metadata={"Software": None})
    return made.getvalue()


_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 9,
    "text.parse_math": False,  # a model's name may hold dollars
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def _height(section: Section) -> float:
    if section.kind == "heat":
        rows = sum(len(panel.series) for panel in section.panels)
        return 1.1 + 0.75 * len(section.panels) + 0.26 * rows
    rows = math.ceil(len(section.panels) / _across(section))
    names = list(_names(section).values())
    return _HEIGHT * rows + 0.25 + (0.2 * math.ceil(len(names) / _beside(names)) if len(names) > 1 else 0.0)


def _across(section: Section) -> int:
    """How many panels stand side by side."""
    return 1 if len(section.panels) == 1 else 3 if len(section.panels) in (3, 5, 6) else 2


def _names(section: Section) -> dict[str, str]:
    """What each curve is called in the picture, by its name: short, and no two the same."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(series.name for panel in section.panels for series in panel.series):
        short, number = _short(name), 1
        while short in found.values():
            number += 1
            short = f"{_short(name)} ({number})"
        found[name] = short
    return found


def _beside(names: Sequence[str]) -> int:
    """How many names the legend has room for in a line."""
    return max(1, min(4, int(_WIDTH / (_LINE + _LETTER * max(map(len, names))))))


def _short(name: str) -> str:
    half = _LONGEST // 2
    name = f" {name}" if name.startswith("_") else name  # matplotlib leaves such names out of the legend
    return name if len(name) <= _LONGEST else f"{name[:half]}…{name[1 - half :]}"


def _curves(section: Section, figure: Figure) -> None:
    across, names = _across(section), _names(section)
    down = math.ceil(len(section.panels) / across)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    every = list(grid.flat)
    for axes, panel in zip(every, section.panels, strict=False):
        _panel(section, panel, axes, across, names)
    _span(section, every[0])
    for axes in every[len(section.panels) :]:
        axes.set_axis_off()
    for place, axes in enumerate(every[: len(section.panels)]):
        if place % across == 0:
            axes.set_ylabel(section.y)
        if place + across >= len(section.panels):
            axes.set_xlabel(section.x)
    lines = {line.get_label(): line for axes in every for line in axes.get_lines() if line.get_label()[:1] != "_"}
    if len(lines) > 1:
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=_beside(list(lines)))


def _span(section: Section, axes: Axes) -> None:
    """Set the vertical axis that all panels share, once all their curves are there."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if section.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if section.limits is not None:
        low, high = _extent(section, section.limits)
        edge = 0.04 * (high - low)
        axes.set_ylim(low - edge * (low < section.limits[0]), high + edge)


def _extent(section: Section, limits: tuple[float, float]) -> tuple[float, float]:
    """The least and the largest of all values and of the span that is asked for."""
    every = [series for panel in section.panels for series in panel.series]
    bounds = [value for series in every for band in series.bands for pair in band for value in pair]
    known = [value for value in (*bounds, *(v for series in every for v in series.values)) if value is not None]
    return min((*known, limits[0])), max((*known, limits[1]))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _panel(section: Section, panel: Panel, axes: Axes, across: int, names: Mapping[str, str]) -> None:
    named = bool(panel.places) and isinstance(panel.places[0], str)
    xs: Sequence[Any] = range(len(panel.places)) if named else panel.places
    if section.line is not None:
        axes.axhline(section.line, color="#808080", linewidth=1, linestyle=(0, (1, 2)))
    for series in panel.series:
        _series(series, names[series.name], xs, axes, len(panel.places) <= _MARKED)
    axes.set_title(panel.title, loc="left")
    for x, text in panel.marks:
        axes.axvline(x, color="#202020", linewidth=1, linestyle=(0, (4, 2)))
        late = len(xs) > 1 and x > (xs[0] + xs[-1]) / 2
        axes.annotate(
            text,
            (x, 1),
            xytext=(-4 if late else 4, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            ha="right" if late else "left",
        )
    if named:
        _name(axes, [str(place) for place in panel.places], across)


def _series(series: Series, name: str, xs: Sequence[Any], axes: Axes, marked: bool) -> None:
    values = list(map(_number, series.values))
    again, place = divmod(series.colour, len(COLOURS))
    colour, marker = (_TOTAL, None) if series.style == "total" else (COLOURS[place], MARKERS[place])
    for depth, band in enumerate(series.bands):
        low, high = ([_number(pair[side]) for pair in band] for side in (0, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=(0.15, 0.3)[min(depth, 1)], linewidth=0)
    alone = sum(not math.isnan(value) for value in values) == 1
    style = {"before": (0, (3, 1.5)), "points": "", "hollow": ""}.get(series.style, _DASHES[again % len(_DASHES)])
    axes.plot(
        xs,
        values,
        color=colour,
        label=name,
        linestyle=style,
        linewidth=1.2 if series.style == "before" else None,
        marker=marker if marked or alone or style == "" else None,
        markerfacecolor="white" if series.style in ("before", "hollow") else None,
    )


def _name(axes: Axes, places: Sequence[str], across: int) -> None:
    """Name the places of the horizontal axis, as many of them as there is room for."""
    letters = max(map(len, places))
    at = _named(places, max(2, min(_TICKS, 120 // letters) // across))
    turned = letters > 6 and len(places) > 2
    axes.set_xticks(at, [places[i] for i in at], rotation=30 if turned else 0, ha="right" if turned else "center")
    axes.set_xlim(-0.5, len(places) - 0.5)


def _named(places: Sequence[str], most: int) -> list[int]:
    """Which places are named: all, or layers of round numbers and what lies outside the layers."""
    if len(places) <= most:
        return list(range(len(places)))
    step = next((step for step in _STEPS if len(places) <= most * step), len(places))
    layers = [int(number) if (number := place.rpartition(" ")[2]).isdigit() else None for place in places]
    if sum(layer is None for layer in layers) > 2:
        return list(range(0, len(places), step))
    ends = [i for i, layer in enumerate(layers) if layer is None]
    round_ = [i for i, layer in enumerate(layers) if layer is not None and layer % step == 0]
    return sorted([*ends, *(i for i in round_ if all(abs(i - end) > step / 2 for end in ends))])


def _heat(section: Section, figure: Figure) -> None:
    sizes = [len(panel.series) for panel in section.panels]
    grid = figure.subplots(len(section.panels), 1, squeeze=False, gridspec_kw={"height_ratios": sizes})
    known = [v for panel in section.panels for series in panel.series for v in series.values if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if section.limits is not None:
        low, high = min(low, section.limits[0]), max(high, section.limits[1])
    names = _names(section)
    image: Any = None
    for axes, panel in zip(grid[:, 0], section.panels, strict=True):
        cells = [list(map(_number, series.values)) for series in panel.series]
        axes.grid(visible=False)
        image = axes.imshow(cells, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        axes.set_yticks(range(len(panel.series)), [names[series.name] for series in panel.series])
        axes.set_title(panel.title, loc="left")
        _name(axes, [str(place) for place in panel.places], 1)
        if len(panel.places) <= _LABELLED:
            _figures(axes, cells, low, high)
    grid[-1, 0].set_xlabel(section.x)
    if image is not None:
        figure.colorbar(image, ax=list(grid[:, 0]), label=section.y)


def _figures(axes: Axes, cells: Sequence[Sequence[float]], low: float, high: float) -> None:
    """Write every field's value in it, in what can be read on its colour."""
    digits = 2 if high - low > 0.1 else 3 if high - low > 0.01 else 4
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            if not math.isnan(value):
                light = value > (low + high) / 2
                axes.text(
                    column,
                    row,
                    f"{value:.{digits}f}",
                    ha="center",
                    va="center",
                    color="black" if light else "white",
                    size=8,
                )
