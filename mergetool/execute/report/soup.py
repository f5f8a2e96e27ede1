"""The section about a greedy soup: every mean that was tried, what it scored, and which were taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergetool.execute.fact_folder import Facts
from mergetool.execute.soup_facts import name_of, read_tried
from mergetool.publish.sections import Cell, Panel, Section, Series, numbers, rounded

_UNITS = {"loss": "nats a prediction", "accuracy": "share of right predictions"}
_BETTER = {"accuracy": "higher"}
"""Which scores are better, where it is not the lower ones."""


def soup_section(facts: Facts, sources: Sequence[str], data: Sequence[str]) -> Section:
    """What was tried, in order.

    Args:
        facts: the scores of each mean on each of the data, called by the numbers of its models: ``1+3:nll``.
        sources: what the models are called, in the order of their numbers.
        data: what the data are called.
    """
    tried = read_tried(facts)
    metric, soup = tried.metric, tried.soup
    means = list(tried.scores)
    # A mean with a model that was refused has it in no later one, so those taken are all that the soup holds whole.
    taken = [mean == (soup.best,) or (len(mean) > 1 and set(mean) <= set(soup.members)) for mean in means]
    scores = np.array(list(tried.scores.values()))
    labels = tuple(map(name_of, means))
    panels = [_panel("mean of all data" if scores.shape[1] > 1 else "", labels, scores.mean(1), taken)]
    if scores.shape[1] > 1:
        panels += [_panel(name, labels, column, taken) for name, column in zip(data, scores.T, strict=True)]
    rows: list[tuple[Cell, ...]] = [
        (", ".join(sources[i] for i in mean), "yes" if is_taken else "no", rounded(float(row.mean())), *numbers(row))
        for mean, is_taken, row in zip(means, taken, scores, strict=True)
    ]
    best, alone = sources[soup.best], soup.tried[soup.best,]
    said = f"The soup is the mean of {', '.join(sources[i] for i in soup.members)}: {metric} {soup.loss:.4f}, "
    if len(soup.members) == 1:
        said = f"The soup is {best} alone: no mean with another is better. "
    return Section(
        name="soup",
        title="Greedy soup: what was tried",
        found=said
        + f"{best} alone {alone:.4f}. "
        + ", ".join(f"{i} is {source}" for i, source in enumerate(sources, 1))
        + ".",
        reading="From left to right what was tried: each model alone, then the best with one more at a time, from "
        f"good to bad. {_BETTER.get(metric, 'lower').capitalize()} is better. Filled: taken, and what comes next "
        "begins with it. Hollow: a model alone that is not the best, or a mean that was refused.",
        warning="All means refused: the models do not share a basin, or one of them is much better than the others on "
        "these data. A soup that is better by less than the data can tell: try it on other data.",
        x="models in the mean",
        y=_UNITS.get(metric, metric),
        panels=tuple(panels),
        columns=("models", "taken", "mean", *data),
        rows=tuple(rows),
    )


def _panel(title: str, labels: tuple[str, ...], scores: Sequence[float], taken: Sequence[bool]) -> Panel:
    values = numbers(scores)
    kept = tuple(value if is_taken else None for value, is_taken in zip(values, taken, strict=True))
    refused = tuple(None if is_taken else value for value, is_taken in zip(values, taken, strict=True))
    return Panel(title, labels, (Series("taken", kept, 0, "points"), Series("not taken", refused, 1, "hollow")))
