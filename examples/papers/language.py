"""Compare merges of the bundled language models: what each recovers of the specialists' gain, tuned on other texts.

    python examples/papers/language.py --cache ~/.cache/mergetool-examples

Writes language.md and language.png beside this file; a quarter of an hour on one core, and as much again the first
time for the models trained on the mixture of all domains. `--cache` is the folder of examples/models/train.py, which
the packages with the texts are fetched into; the mixture's models are kept there too.

Scales and densities are those that recover most of examples/data/validation; what is told is measured on the test
texts of examples/data. Calibration data are 8,192 tokens a domain of the texts that its specialist was trained on. A
seed draws other windows and another order of training, and other masks for DARE; tables give the mean and the standard
deviation over seeds. All merges are made by mergetool: those with data by recipes, the others by `merge_tensors`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from language_models import DOMAINS, Bench, Score, Weights, held_out, load, specialists_texts, trainer, windows
from language_recipes import Calibration, in_memory

SCALES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2]  # of summed deltas: 1/3 is the average
TIES_SCALES = [0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0]  # of deltas averaged where they agree
DENSITIES = [0.1, 0.2, 0.4, 0.6, 0.8]
TRIALS = 45  # merges that every method may try


@dataclass
class Row:
    """One line of the table: a name and a score for each seed."""

    name: str
    scores: list[Score]
    validation: list[Score]

    def cells(self) -> list[str]:
        """Recovered (validation, test, worst domain), then nats of each domain and of all."""
        measured = [[each.mean for each in self.validation], [each.mean for each in self.scores]]
        shown = [_cell(each) for each in [*measured, [each.worst for each in self.scores]]]
        nats = [[each.nll[at] for each in self.scores] for at in range(len(DOMAINS))]
        return [self.name, *shown, *map(_cell, nats), _cell([mean(each.nll) for each in self.scores])]


def _cell(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


# ------------------------------------------------------------------------------------------------ tuning


def best(bench: Bench, method: str, grid: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """The values whose merge recovers most of the validation texts, and how much."""
    assert len(grid) <= TRIALS
    found = [(bench.score(in_memory(bench, method, **values), "validation").mean, values) for values in grid]
    value, chosen = max(found, key=lambda each: each[0])
    return chosen, value


def one_scale(bench: Bench) -> dict[str, Any]:
    """Task arithmetic's one scale: a grid, and then a finer one about its best."""
    coarse, _ = best(bench, "task_arithmetic", [{"lambda": x} for x in SCALES])
    fine = [{"lambda": round(coarse["lambda"] + 0.01 * i, 2)} for i in range(-9, 10)]
    return best(bench, "task_arithmetic", fine)[0]


def scale_each(bench: Bench) -> dict[str, Any]:
    """A scale for each specialist: one after the other moved as long as that helps, in ever smaller steps."""
    weights, trials = [0.7] * len(DOMAINS), TRIALS
    top = best(bench, "task_arithmetic", [{"weight": weights}])[1]
    for step in (0.2, 0.1, 0.05, 0.025):
        moved = True
        while moved and trials >= 2 * len(DOMAINS):
            moved = False
            for at in range(len(DOMAINS)):
                steps = (-step, step)
                tries = [[w + by * (i == at) for i, w in enumerate(weights)] for by in steps]
                trials -= len(tries)
                chosen, value = best(bench, "task_arithmetic", [{"weight": each} for each in tries])
                if value > top:
                    weights, top, moved = [round(each, 3) for each in chosen["weight"]], value, True
    return {"weight": weights}


def grid(scales: Sequence[float], **more: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of a scale, a density and what else there is."""
    names = ["lambda", "density", *more]
    return [dict(zip(names, values, strict=True)) for values in product(scales, DENSITIES, *more.values())]


# ------------------------------------------------------------------------------------------------ rows

Found = tuple[str, Callable[[int], Weights], int]
"""The name of a row, what makes its weights from a seed, and of how many seeds."""


def measured(bench: Bench, found: Found) -> Row:
    """Measure what is made for each seed."""
    name, made, seeds = found
    began, row = time.perf_counter(), Row(name, [], [])
    for seed in range(seeds):
        weights = made(seed)
        row.scores.append(bench.score(weights, "test"))
        row.validation.append(bench.score(weights, "validation"))
    print(f"| {' | '.join(row.cells())} |  {time.perf_counter() - began:.0f} s", flush=True)
    return row


def tuned(bench: Bench, label: str, method: str, values: dict[str, Any], seeds: int = 1) -> Found:
    """What needs nothing but the models, named by the values that the validation texts found best."""
    told = [
        f"{name} {' '.join(f'{x:.3g}' for x in value) if isinstance(value, list) else value}"
        for name, value in values.items()
        if value is not True
    ]
    return ", ".join([label, *told]), lambda seed: in_memory(bench, method, seed=seed, **values), seeds


def kinds(bench: Bench, cache: Path, seeds: int) -> dict[str, Callable[[], Found]]:
    """Everything that is compared, by a short name; nothing is tuned or made until it is asked for."""
    calibration, mixture, train = Calibration(cache / "texts"), cache / "mixture", trainer()
    average = {"lambda": 1 / len(DOMAINS)}
    made: dict[str, Callable[[], Found]] = {
        "base": lambda: ("base", lambda seed: bench.base, 1),
        "average": lambda: ("average", lambda seed: in_memory(bench, "task_arithmetic", **average), 1),
        "task arithmetic": lambda: tuned(bench, "task arithmetic", "task_arithmetic", one_scale(bench)),
        "each": lambda: tuned(bench, "task arithmetic", "task_arithmetic", scale_each(bench)),
        "TIES": lambda: tuned(bench, "TIES", "ties", best(bench, "ties", grid(TIES_SCALES))[0]),
        "DARE": lambda: tuned(bench, "DARE", "dare_linear", best(bench, "dare_linear", grid(SCALES))[0], seeds),
        "DARE-TIES": lambda: tuned(
            bench, "DARE-TIES", "dare_ties", best(bench, "dare_ties", grid(TIES_SCALES, normalize=[True]))[0], seeds
        ),
    }
    columns = partial(calibration.run, "dam", parameters={"granularity": "column"}, train={"learning_rate": 0.3})
    made |= {
        "Fisher": lambda: ("Fisher", partial(calibration.run, "fisher"), seeds),
        "RegMean": lambda: ("RegMean", partial(calibration.run, "regmean"), seeds),
        "DAM, columns": lambda: ("DAM, columns alone, rate 0.3", columns, seeds),
        "**DAM**": lambda: ("**DAM**", partial(calibration.run, "dam"), seeds),
    }
    for steps in train.MIXTURE_STEPS:
        name, stem = f"trained on the mixture, {steps} steps", f"mixture-{steps}"
        of_seed = partial(_mixture, mixture, stem)
        made[stem] = lambda name=name, of_seed=of_seed: (name, of_seed, train.MIXTURE_SEEDS)
    return made


def _mixture(folder: Path, stem: str, seed: int) -> Weights:
    return load(folder / f"{stem}-{seed}")


def rows(bench: Bench, cache: Path, seeds: int, kept: Path) -> list[Row]:
    """All rows; those that were measured before are in a JSON file, and the others are added to it."""
    known = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    result = []
    for kind, found in kinds(bench, cache, seeds).items():
        if kind not in known:
            known[kind] = asdict(measured(bench, found()))
            kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
        told = known[kind]
        result.append(Row(told["name"], *([Score(**each) for each in told[k]] for k in ("scores", "validation"))))
    return result


# ------------------------------------------------------------------------------------------------ reporting

HEAD = ["", "recovered, validation", "recovered, test", "worst domain, test",
        *(f"nats, {name}" for name in DOMAINS), "nats"]  # fmt: skip


def table(every: Sequence[Row], bench: Bench) -> str:
    """All rows in Markdown, and the specialists at home."""
    own = [bench.score(weights, "test").nll[at] for at, weights in enumerate(bench.specialists.values())]
    home = ["each domain's own specialist", "1", "1", "1", *(f"{nll:.3f}" for nll in own), f"{mean(own):.3f}"]
    lines = [HEAD, ["---"] * len(HEAD), *(each.cells() for each in every), home]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def plot(every: Sequence[Row], path: Path) -> None:
    """Bars of what is recovered on the test texts, a mark for the worst domain, whiskers of a standard deviation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.35 * len(every) + 1))
    names = [each.name.replace("*", "") for each in every]
    for height, values, look in (
        (0.7, [[s.mean for s in each.scores] for each in every], {"color": "#4c78a8", "label": "mean of the domains"}),
        (0.25, [[s.worst for s in each.scores] for each in every], {"color": "#f58518", "label": "worst domain"}),
    ):
        spread = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        axis.barh(names, list(map(mean, values)), height=height, xerr=spread, **look)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("recovered of the specialists' gain, test texts")
    axis.legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Merge, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="packages of examples/models/train.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="gets language.md and language.png")
    parser.add_argument("--results", type=Path, help="a JSON file with what was measured before; one in the cache")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every run
    texts = options.cache / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    if not all((texts / f"{name}.txt").exists() for name in DOMAINS):
        for name, text in specialists_texts(options.cache).items():
            (texts / f"{name}.txt").write_text(text, encoding="utf-8")
    bench = Bench({s: {n: windows(held_out(s, n)) for n in DOMAINS} for s in ("validation", "test")})
    trainer().write_mixtures(options.cache, options.cache / "mixture")
    every = rows(bench, options.cache, options.seeds, options.results or options.cache / "language.json")
    (options.out / "language.md").write_text(table(every, bench), encoding="utf-8")
    plot(every[1:], options.out / "language.png")


if __name__ == "__main__":
    main()
