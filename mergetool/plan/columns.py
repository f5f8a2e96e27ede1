"""Numbers and tables as text that fits a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100
"""Columns that a page of text may take."""
_GAP = "  "


def size(nbytes: int) -> str:
    """A number of bytes for people, in decimal units: ``1.61 GB``."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(number: int) -> str:
    """A number of weights for people: ``8.03 B`` is eight (American) billions."""
    return _scaled(number, ("", "k", "M", "B", "T")).strip()


def _scaled(number: int, units: Sequence[str]) -> str:
    value, place = float(number), 0
    while value >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    digits = 0 if place == 0 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {units[place]}"


def plural(number: int, noun: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shorten(text: str, width: int) -> str:
    """The text with its middle left out, if it is longer than ``width``."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = (), indent: int = 2) -> list[str]:
    """The rows as aligned lines; what is too wide for the page is shortened in the widest column.

    Args:
        rows: the cells of each row, the heads first if there are any.
        right: the columns that are aligned to the right.
        indent: spaces before each line.
    """
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    excess = indent + sum(widths) + len(_GAP) * (len(widths) - 1) - WIDTH
    if excess > 0:
        widest = max(range(len(widths)), key=widths.__getitem__)
        widths[widest] = max(widths[widest] - excess, 12)
    right = set(right)
    lines = []
    for row in rows:
        cells = [shorten(cell, width) for cell, width in zip(row, widths, strict=True)]
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append((" " * indent + _GAP.join(padded)).rstrip())
    return lines


def paragraph(text: str, indent: int = 2, head: str = "") -> str:
    """The text wrapped to the page, with a head in its margin."""
    space = " " * indent
    first = head.ljust(indent)
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=space, break_on_hyphens=False)
