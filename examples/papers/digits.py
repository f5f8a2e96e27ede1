"""Measure on 8×8 digits what alignment, REPAIR, TACT, RegMean and DAM are worth, as their papers' small protocols.

    python examples/papers/digits.py

Trains small networks on changed digits, turns, merges and corrects them with mergetool, prints a table for each
protocol and writes them to digits.md and digits.png beside this file. Everything is repeated for each seed; tables
give the mean and the standard deviation over seeds, and beside them is what differs between two rows seed by seed
(`digits_orderings.py`). `--save FOLDER` keeps the networks and the data as folders and CSV files, which recipes can
read through `digits_adapter.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_data import Data, Task, UnavailableError, fetch, task
from digits_merging import COLUMNS, PUBLISHED, average, dam, regmean, scale_each, task_arithmetic, ties
from digits_networks import (
    LAYERS,
    STEPS,
    Weights,
    accuracy,
    by_activations,
    by_weights,
    corrected,
    ensemble_accuracy,
    gives,
    he,
    moments,
    save,
    small,
    train,
    with_head,
)
from digits_orderings import CORRECTIONS, CORRELATION, INNER, ORDERINGS, compared
from digits_tables import Rows, Table, plot

from mergetool.facts.correction import goal, spread_ratio

PAIRS = (("plain", "rotated"), ("rotated", "inverted"), ("flipped", "inverted"))
DOMAINS = ("shifted", "noisy", "rotated")
MANY = ("rotated", "inverted", "flipped", "half turn", "transposed", "halves swapped", "rotated back",
        "inverted, rotated")  # fmt: skip
FEW = 64
OTHER = 1000  # what is added to a seed for the other network
TUNING_STEPS = 300
SCALES = [round(0.5 + 0.05 * i, 2) for i in range(51)]  # of the mean of the deltas: 1 is the average
FEWER = 32

Merge = Callable[[Weights, list[Weights], float], Weights]
Protocol = Callable[[int, Path | None], Rows]


def learnt(own: Task, seed: int, folder: Path | None, start: Weights | None = None, steps: int = STEPS) -> Weights:
    """A network trained on a task, from the random weights of its seed unless told; kept with its data if asked."""
    weights = train(own, seed, he(seed) if start is None else start, steps)
    if folder is not None:
        name = own.name.replace(",", "").replace(" ", "-")
        save(weights, folder / "networks" / f"{name}-{seed}{'' if start is None else '-started'}")
        for split in ("train", "test"):
            path = folder / "data" / f"{name}-{split}.csv"
            path.parent.mkdir(exist_ok=True)
            data: Data = getattr(own, split)
            rows = np.column_stack([data.x.numpy() * 16, data.y.numpy()])
            np.savetxt(path, rows, fmt="%.4g", delimiter=",")
    return weights


def one_task(seed: int, folder: Path | None) -> Rows:
    """REPAIR's protocol: two networks that learnt the same from different starts, and their average."""
    own = task("plain")
    first, second = (learnt(own, each, folder) for each in (seed, seed + OTHER))
    networks = {"network A": first, "network B": second}
    turned = _turned(first, second, own.train)
    for name, other in turned.items():
        merged = average([first, other])
        networks[name] = merged
        networks[f"{name} + REPAIR"] = corrected(merged, [first, other], own.train.x)
    rows = {name: {"accuracy": accuracy(weights, own.test)} for name, weights in networks.items()}
    for name, other in turned.items():
        for suffix in ("", " + REPAIR"):
            for at, layer in enumerate(LAYERS):
                ends = [moments(gives(weights, layer, own.train.x)) for weights in (first, other)]
                here = moments(gives(networks[name + suffix], layer, own.train.x))
                rows[name + suffix][f"σ merged / σ goal, layer {at + 1}"] = 100 * spread_ratio(goal(ends), here)
    return rows


def _turned(first: Weights, second: Weights, data: Data) -> dict[str, Weights]:
    """The second network as it is, and turned to face the first in three ways."""
    return {
        "naive": second,
        "weight matching": by_weights(first, second),
        CORRELATION: by_activations(first, second, data.x, "correlation"),
        INNER: by_activations(first, second, data.x, "inner_product"),
    }


def two_tasks(seed: int, folder: Path | None, start: Callable[[int], Weights] | None = None) -> Rows:
    """TACT's protocol: networks of different starts and tasks, one body, each task's own head."""
    rows: Rows = {}
    for names in PAIRS:
        pair = tuple(task(name, relabelled=True) for name in names)
        seeds = (seed, seed + OTHER)
        networks = tuple(
            learnt(own, each, folder, start(each) if start else None) for own, each in zip(pair, seeds, strict=True)
        )
        for row, value in _of_pair(pair, networks).items():
            rows.setdefault(row, {})[" + ".join(names)] = value
    return rows


def _of_pair(tasks: tuple[Task, ...], networks: tuple[Weights, ...]) -> dict[str, float]:
    """Mean accuracy of both tasks for every way to merge the two."""
    first, second = networks
    mixture = tasks[0].train + tasks[1].train
    result = {}
    for name, other in _turned(first, second, mixture).items():
        owners = (first, other)
        body = average(owners)

        def score(change: Callable[[Weights, Weights, Task], Weights], body: Weights = body,
                  owners: tuple[Weights, ...] = owners) -> float:  # fmt: skip
            both = zip(owners, tasks, strict=True)
            return _mean(accuracy(change(with_head(body, owner), owner, own), own.test) for owner, own in both)

        result[name] = score(lambda merged, owner, own: merged)
        if name != "weight matching":
            result[f"{name} + TACT, all layers"] = score(
                lambda merged, owner, own: corrected(merged, [owner], own.train.x)
            )
        if name in (CORRELATION, INNER):
            result[f"{name} + REPAIR"] = score(
                lambda merged, owner, own, owners=owners: corrected(merged, owners, mixture.x)
            )
            result[f"{name} + TACT, output"] = score(
                lambda merged, owner, own: corrected(merged, [owner], own.train.x, "output")
            )
        if name == CORRELATION:
            for samples in (16, FEW):
                result[f"{name} + TACT, all layers, {samples} images"] = score(
                    lambda merged, owner, own, samples=samples: corrected(merged, [owner], own.train.some(samples).x)
                )
    result["experts"] = _mean(accuracy(owner, own.test) for owner, own in zip(networks, tasks, strict=True))
    ways = [f"{name}{more}" for name in (CORRELATION, INNER) for more in ("", " + REPAIR", *CORRECTIONS)]
    order = ["naive", "weight matching", *ways]
    return {row: result[row] for row in [*order, *(row for row in result if row not in order)]}


def two_domains(seed: int, folder: Path | None) -> Rows:
    """The RegMean rows of PLeaS's protocol: plain digits and changed ones under the same labels and one head."""
    rows: Rows = {}
    plain = task("plain")
    first = learnt(plain, seed, folder)
    for name in DOMAINS:
        own = task(name)
        second = learnt(own, seed + OTHER, folder)
        tests = (plain.test, own.test)
        merged = {"network of plain digits": first, "network of the other domain": second}
        for way, other in _turned(first, second, plain.train + own.train).items():
            merged[way] = average([first, other])
            regular = "RegMean" if way == "naive" else f"{way} + RegMean"
            merged[regular] = regmean([first, other], [plain.train, own.train])
        for row, weights in merged.items():
            rows.setdefault(row, {})[name] = _mean(accuracy(weights, data) for data in tests)
        ensemble = _mean(ensemble_accuracy([first, second], data) for data in tests)
        rows.setdefault("ensemble of both (twice the size)", {})[name] = ensemble
    return rows


def many_tasks(seed: int, folder: Path | None) -> Rows:
    """DAM's protocol: fine-tunes of one base on two, four and eight changes of the digits, one head."""
    plain = task("plain")
    base = learnt(plain, seed, folder)
    tasks = [task(name) for name in MANY]
    experts = [learnt(own, seed, folder, base, TUNING_STEPS) for own in tasks]
    rows: Rows = {}
    for n in (2, 4, 8):
        some, own = experts[:n], [each.train for each in tasks[:n]]
        few = [data.some(FEWER) for data in own]

        def score(weights: Weights, split: str = "test", n: int = n) -> float:
            return _mean(accuracy(weights, getattr(each, split)) for each in tasks[:n])

        def best(merge: Merge, scales: list[float], some: list[Weights] = some, score: Any = score) -> float:
            return max(scales, key=lambda scale: score(merge(base, some, scale), "train"))

        common, trimmed = best(task_arithmetic, [x / n for x in SCALES]), best(ties, SCALES)
        each_own = scale_each(base, some, common, partial(score, split="train"))
        found = {
            "base": score(base),
            "average": score(average(some)),
            "task arithmetic, best scale": score(task_arithmetic(base, some, common)),
            "task arithmetic, a scale for each": score(task_arithmetic(base, some, 1.0, each_own)),
            "TIES, best scale": score(ties(base, some, trimmed)),
            "RegMean": score(regmean(some, own)),
            "DAM, per tensor": score(dam(base, some, own, replace(COLUMNS, granularity="tensor"))),
            "DAM, per column": score(dam(base, some, own, COLUMNS)),
            f"DAM, per column, {FEWER} images a task": score(dam(base, some, few, COLUMNS)),
            "DAM, per row and column": score(dam(base, some, own)),
            f"DAM, per row and column, {FEWER} images a task": score(dam(base, some, few)),
            "DAM as published": score(dam(base, some, own, PUBLISHED)),
            "DAM as published, no similarity term": score(dam(base, some, own, replace(PUBLISHED, similarity=0.0))),
            "experts": _mean(accuracy(weights, each.test) for weights, each in zip(some, tasks, strict=False)),
        }
        for row, value in found.items():
            rows.setdefault(row, {})[f"{n} tasks"] = value
        for row, scales in (
            ("average", [1 / n] * n),
            ("task arithmetic, best scale", [common] * n),
            ("task arithmetic, a scale for each", each_own),
        ):
            weights = task_arithmetic(base, some, 1.0, scales)
            worst = min(accuracy(weights, each.test) for each in tasks[:n])
            rows[row][f"mean scale / average's, {n} tasks"] = 100 * sum(scales)
            rows[row][f"worst task / mean, {n} tasks"] = 100 * worst / score(weights)
    return rows


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


PROTOCOLS: dict[str, Protocol] = {
    "One task, two starts": one_task,
    "Two tasks, two starts, private heads": two_tasks,
    "The same from torch's own, smaller start": partial(two_tasks, start=small),
    "Two domains, two starts, one head": two_domains,
    "Fine-tunes of one base, one head": many_tasks,
}


def work(protocol: str, seed: int, folder: Path | None) -> Rows:
    """One protocol for one seed, on one thread: the same sums in the same order on every run."""
    torch.set_num_threads(1)
    return PROTOCOLS[protocol](seed, folder)


def results(seeds: int, workers: int, folder: Path | None, kept: Path | None) -> dict[str, Rows]:
    """Every protocol's rows for every seed; those that a JSON file holds are not made again, and others added to it."""
    known: dict[str, Rows] = json.loads(kept.read_text("utf-8")) if kept and kept.exists() else {}
    began = time.perf_counter()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        asked = {
            pool.submit(work, title, seed, folder): name
            for seed in range(seeds)
            for title in PROTOCOLS
            if (name := f"{title}, seed {seed}") not in known
        }
        for each in as_completed(asked):
            known[asked[each]] = each.result()
            print(f"{asked[each]}: after {time.perf_counter() - began:.0f} s", flush=True)
            if kept:
                kept.write_text(json.dumps(known), encoding="utf-8")
    return known


def main() -> None:
    """Run every protocol for every seed, compare what the papers order, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=6, help="how many times all is repeated")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    parser.add_argument("--results", type=Path, help="a JSON file to continue")
    parser.add_argument("--save", type=Path, help="gets the networks as model folders and the data as CSV files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="gets digits.md and digits.png")
    options = parser.parse_args()
    try:
        fetch()
    except UnavailableError as error:
        sys.exit(str(error))
    found = results(options.seeds, options.workers, options.save, options.results)
    tables, texts = [], []
    for title in PROTOCOLS:
        table = Table(title)
        for seed in range(options.seeds):
            table.add(found[f"{title}, seed {seed}"])
        tables.append(table)
        texts.append(table.markdown())
        if options.seeds > 1:
            texts.append(compared(table, ORDERINGS[title]))
    print("", *texts, sep="\n\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "digits.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    plot(tables, options.out / "digits.png")


if __name__ == "__main__":
    main()
