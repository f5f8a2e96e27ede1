"""The sections about trained coefficients: how training went, and what came of it in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.execute.report.depth import Depth
from mergetool.facts.dam import ROWS, Coefficients
from mergetool.publish.sections import Cell, Panel, Section, Series, Value, numbers, rounded

_STEPS = 400
"""Points of a training curve, at most; of more steps means are drawn."""


def training_section(about: Mapping[str, Any], sources: Sequence[str]) -> Section:
    """How training went: the loss of each source's data, and the KL on what was held out.

    Args:
        about: the content of ``dam.json``.
        sources: what its sources are called here.
    """
    steps, held = about["curve"]["steps"], about["curve"]["held_out"]
    settings, best = about["settings"], about["best_step"]
    panels = [Panel(f"training data ({settings['loss']})", *_curve(steps, "loss", sources))] if steps else []
    marks = ((float(best), f"taken: step {best}"),)
    if held:
        panels.append(Panel("held-out data (kl)", *_curve(held, "kl", sources), marks))
    rows: list[tuple[Cell, ...]] = [
        ("training", each["step"], rounded(each["loss"]), rounded(each["penalty"]), *numbers(each["each"]))
        for each in steps
    ]
    rows += [("held out", each["step"], rounded(each["kl"]), None, *numbers(each["each"])) for each in held]
    return Section(
        name="training",
        title="Training of the coefficients",
        found=_said(about),
        reading="How far the merged model's predictions are from those of the source that knows the data, in nats a "
        "token; 0 would be the same predictions. Left the rows that are trained on, right rows that training never "
        "sees; the coefficients of the step with the lowest sum on the right are taken.",
        warning="The right sum rising while the left falls: too little data, stop earlier or give more. A source "
        "whose curve stays high or rises: the merge is paid for by that model. Jumps: lower `learning_rate`.",
        x="step",
        y="nats a token",
        panels=tuple(panels),
        limits=(0.0, 0.0),
        columns=("data", "step", "sum", "penalty", *sources),
        rows=tuple(rows),
    )


def _curve(
    records: Sequence[Mapping[str, Any]], key: str, sources: Sequence[str]
) -> tuple[tuple[float, ...], tuple[Series, ...]]:
    """The steps, and a curve for each source and for the sum."""
    runs = [list(run) for run in np.array_split(np.arange(len(records)), min(len(records), _STEPS))]

    def thinned(values: Sequence[float]) -> tuple[Value, ...]:
        return numbers(np.mean([values[i] for i in run]) for run in runs)

    places = tuple(float(records[run[-1]]["step"]) for run in runs)
    each = [Series(source, thinned([record["each"][i] for record in records]), i) for i, source in enumerate(sources)]
    return places, (*each, Series("sum", thinned([record[key] for record in records]), style="total"))


def _said(about: Mapping[str, Any]) -> str:
    steps, best, most = about["steps"], about["best_step"], about["settings"]["steps"]
    held = {each["step"]: each["kl"] for each in about["curve"]["held_out"]}
    stopped = f"Stopped after {steps} of at most {most} steps" if steps < most else f"All {steps} steps were made"
    if best not in held:
        return f"{stopped}; nothing was held out, and the last coefficients were taken."
    begun = f" from {held[0]:.4f}" if 0 in held else ""
    taken = f"the coefficients of step {best} were taken, where the held-out KL had come{begun} to {held[best]:.4f}"
    return f"{stopped}; {taken}."


def coefficients_section(made: Coefficients, sources: Sequence[str], base: str | None, depth: Depth) -> Section:
    """How the coefficients of every source are spread in each layer, and those of rows that are added to them.

    Args:
        made: the coefficients.
        sources: what their sources are called here.
        base: what the base is called here, if there is one.
        depth: the places of the models' tensors.
    """
    added = any(name.endswith(ROWS) for name in made.values)
    every = [_pooled(made, number, depth, 0) for number in range(len(sources))]
    used = depth.only(i for pools in every for i, pool in enumerate(pools) if pool.size)
    panels = [
        Panel(source, used.places, (_spread(every[number], used, depth, number),))
        for number, source in enumerate(sources)
    ]
    if added:
        panels += [
            Panel(f"{source}: added by rows", used.places, (_spread(_pooled(made, i, depth, 1), used, depth, i),))
            for i, source in enumerate(sources)
        ]
    rows: list[tuple[Cell, ...]] = [
        (source, name, *numbers((v.min(), v.mean(), v.max())), int(v.size))
        for name, values in made.values.items()
        for source, v in zip(sources, values.reshape(len(sources), -1).astype(np.float64), strict=True)
    ]
    means = [float(np.concatenate(pools).mean()) for pools in every]
    start = 1 / len(sources)
    of = f"what the model changed of {base}" if made.form == "delta" and base else "the model's weights"
    return Section(
        name="coefficients",
        title="Coefficients in every layer",
        found="Mean of all coefficients: "
        + ", ".join(f"{source} {mean:.3f}" for source, mean in zip(sources, means, strict=True))
        + f" ({_shared(made.granularity)} of every weight; it weighs {of}).",
        reading="The curve is the mean of a layer's coefficients, the dark band holds the middle 80 % of them, the "
        f"light band all. The dotted line is where training began for the average, 1/{len(sources)}. `in` are "
        "embeddings, `out` is what comes after the last layer." + (_ADDED if added else ""),
        warning="A dark band much wider in one layer than in its neighbours, or a mean below 0 or far above 1: "
        "training fits its data rather than the models; give more data, or a penalty such as `l2`. A source whose mean "
        "is near 0 everywhere takes no part in the merge. Bands without any width: coefficients that were not trained.",
        x="layer",
        y="coefficient",
        panels=tuple(panels),
        line=rounded(start),
        limits=(0.0, 1.0),
        columns=("source", "weight", "least", "mean", "largest", "coefficients"),
        rows=tuple(rows),
    )


_ADDED = (
    " Each entry of a matrix is weighed by the sum of its column's coefficient and what its row adds: the first panels "
    "are of columns, norms and biases, those after them of what rows add, which began at 0."
)


def _shared(granularity: str) -> str:
    if granularity == "row+column":
        return "for every entry the sum of its column's and its row's"
    return f"one for every {granularity}"


def _pooled(made: Coefficients, source: int, depth: Depth, which: int) -> list[NDArray[np.float64]]:
    """All coefficients of a source at each place, of the first set of each weight or of what is added to it."""
    pools: list[list[NDArray[np.float64]]] = [[] for _ in depth.places]
    for name in made.weights:
        if name in depth.at:
            found = made.of(name)[which : which + 1]
            pools[depth.at[name]] += [values[source].reshape(-1).astype(np.float64) for values, _ in found]
    return [np.concatenate(pool) if pool else np.empty(0) for pool in pools]


def _spread(every: Sequence[NDArray[np.float64]], used: Depth, depth: Depth, colour: int) -> Series:
    """The mean of the coefficients at each place that is used, the middle 80 % of them and all."""
    pools = [pool for place, pool in zip(depth.places, every, strict=True) if place in used.places]
    bands = (tuple(_quantiles(p, 0, 1) for p in pools), tuple(_quantiles(p, 0.1, 0.9) for p in pools))
    means = tuple(rounded(float(p.mean())) if p.size else None for p in pools)
    return Series("mean", means, colour, bands=bands)


def _quantiles(pool: NDArray[np.float64], low: float, high: float) -> tuple[Value, Value]:
    if not pool.size:
        return None, None
    return rounded(float(np.quantile(pool, low))), rounded(float(np.quantile(pool, high)))
