"""Whether one row of a table is above another: paired differences over seeds, and how likely noise alone makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from digits_tables import Table
from scipy.stats import binomtest, ttest_rel

Ordering = tuple[str, str]
"""The row that the papers have above, and the one below."""

CORRELATION, INNER = "activation matching (correlation)", "activation matching (inner product)"
CORRECTIONS = (" + TACT, output", " + TACT, all layers")


def _tact(aligned: str) -> tuple[Ordering, ...]:
    output, every = (f"{aligned}{correction}" for correction in CORRECTIONS)
    return (
        (aligned, "naive"),
        (aligned, "weight matching"),
        (f"{aligned} + REPAIR", aligned),
        (output, f"{aligned} + REPAIR"),
        (every, output),
        (every, "naive + TACT, all layers"),
        ("experts", every),
    )


def _both(*suffixes: str) -> tuple[Ordering, ...]:
    """The one way to match activations beside the other."""
    return tuple((f"{INNER}{suffix}", f"{CORRELATION}{suffix}") for suffix in suffixes)


_TACT: tuple[Ordering, ...] = (
    ("weight matching", "naive"),
    *_tact(CORRELATION),
    *_tact(INNER),
    *_both("", " + REPAIR", *CORRECTIONS),
)
ORDERINGS: dict[str, tuple[Ordering, ...]] = {
    "One task, two starts": (
        ("weight matching", "naive"),
        ("weight matching + REPAIR", "weight matching"),
        *(
            ordering
            for aligned in (CORRELATION, INNER)
            for ordering in (
                (aligned, "weight matching"),
                (f"{aligned} + REPAIR", aligned),
                (f"{aligned} + REPAIR", "weight matching + REPAIR"),
                ("network A", f"{aligned} + REPAIR"),
            )
        ),
        *_both("", " + REPAIR"),
    ),
    "Two tasks, two starts, private heads": _TACT,
    "The same from torch's own, smaller start": _TACT,
    "Two domains, two starts, one head": (
        ("weight matching", "naive"),
        ("weight matching + RegMean", "RegMean"),
        *(
            ordering
            for aligned in (CORRELATION, INNER)
            for ordering in (
                (aligned, "weight matching"),
                (f"{aligned} + RegMean", "RegMean"),
                (f"{aligned} + RegMean", "weight matching + RegMean"),
            )
        ),
        *_both("", " + RegMean"),
    ),
    "Fine-tunes of one base, one head": (
        ("task arithmetic, best scale", "average"),
        ("task arithmetic, a scale for each", "average"),
        ("task arithmetic, a scale for each", "task arithmetic, best scale"),
        ("DAM, per column", "task arithmetic, best scale"),
        ("DAM, per column", "task arithmetic, a scale for each"),
        ("DAM, per row and column", "DAM, per column"),
        ("DAM, per column", "DAM, per tensor"),
        ("DAM, per column", "DAM as published"),
        ("DAM, per column", "RegMean"),
    ),
}
"""Of each protocol what the papers claim, one step of the order after the other."""


def compared(table: Table, orderings: Sequence[Ordering]) -> str:
    """The differences in Markdown, in points of accuracy: in each column, then of the mean over columns.

    A cell tells mean ± standard deviation of the paired differences over seeds and p of the one-sided paired t-test;
    the last column, in how many seeds the mean over columns differs that way and p of the sign test of that.
    """
    columns = table.accuracies
    several = len(columns) > 1
    head = ["above − below", *columns, *(["mean of these"] if several else []), "seeds that agree"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for above, below in orderings:
        high, low = (np.array([table.rows[row][column] for column in columns]) for row in (above, below))
        pairs = [*zip(high, low, strict=True), *([(high.mean(0), low.mean(0))] if several else [])]
        agree = int((high.mean(0) > low.mean(0)).sum())
        sign = binomtest(agree, high.shape[1], alternative="greater").pvalue
        signs = f"{agree} of {high.shape[1]}, {_p(sign)}"
        lines.append(f"| {above} − {below} | {' | '.join([*(_cell(*pair) for pair in pairs), signs])} |")
    return "\n".join(lines)


def _cell(high: np.ndarray, low: np.ndarray) -> str:
    difference = high - low
    shown = f"{difference.mean():+.1f} ± {difference.std(ddof=1):.1f}"
    if not difference.std():  # the test has nothing to measure by
        return shown
    return f"{shown}, {_p(ttest_rel(high, low, alternative='greater').pvalue)}"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"
