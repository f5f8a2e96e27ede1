"""Tables of accuracies over seeds, in Markdown and as bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Rows = dict[str, dict[str, float]]


@dataclass
class Table:
    """One protocol's accuracies: row → column → one value for each seed."""

    title: str
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, rows: Rows) -> None:
        """Add the values of one seed."""
        for row, columns in rows.items():
            for column, value in columns.items():
                self.rows.setdefault(row, {}).setdefault(column, []).append(value)

    @property
    def columns(self) -> list[str]:
        """All columns, in the order they came."""
        return list(dict.fromkeys(column for columns in self.rows.values() for column in columns))

    @property
    def accuracies(self) -> list[str]:
        """The columns of accuracies; those of ratios are named by what is divided by what."""
        return [column for column in self.columns if " / " not in column]

    def markdown(self) -> str:
        """The table, mean ± standard deviation over seeds."""
        lines = [f"| {self.title} | {' | '.join(self.columns)} |", f"|---|{'---|' * len(self.columns)}"]
        for row, columns in self.rows.items():
            cells = (_cell(columns[column]) if column in columns else "" for column in self.columns)
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def plot(tables: list[Table], path: Path) -> None:
    """Bars of every table's accuracies, the mean over its columns, whiskers of a standard deviation over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(table.rows) for table in tables]
    figure, axes = plt.subplots(len(tables), figsize=(8, 0.3 * sum(heights) + 3), height_ratios=heights)
    for axis, table in zip(axes, tables, strict=True):
        shown = table.accuracies
        values = [np.mean([table.rows[row][column] for column in shown], axis=0) for row in table.rows]
        spread = [np.std(value, ddof=1) if len(value) > 1 else 0.0 for value in values]
        axis.barh(list(table.rows), [value.mean() for value in values], xerr=spread, color="#4c78a8")
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(table.title, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
    axes[-1].set_xlabel("accuracy, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
