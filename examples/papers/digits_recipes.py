"""Measure on 8×8 digits what RegMean in sequence and greedy soups are worth, all of it merged by recipes.

    python examples/papers/digits_recipes.py

Trains networks as `digits.py` does, keeps them as model folders and their images as CSV files, runs recipes that read
them through `digits_adapter.py`, and prints a table for each method with the per cent that the written models get right
on test images, mean ± standard deviation over seeds. A minute or two on one core. Needs torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from digits import MANY, OTHER, TUNING_STEPS
from digits_data import Data, Task, UnavailableError, fetch, task
from digits_merging import regmean
from digits_networks import Weights, accuracy, he, load, save, train
from digits_tables import Rows, Table

from mergetool import build, run
from mergetool import load as load_recipe

IMAGES = 128
"""Images of a task that recipes calibrate with, unless more are asked for."""
ALL = 1297


def merged(folder: Path, method: str, models: dict[str, str], data: dict[str, int], more: str = "") -> Weights:
    """Run a recipe over networks that are kept in a folder, and read what it wrote.

    Args:
        folder: has the networks under `networks` and images under `data`.
        method: the merge method, perhaps with parameters behind a line break.
        models: the networks' names, and the name of the data that each has as its own, or nothing.
        data: the names of data and how many images are taken.
        more: further lines of the recipe.
    """
    listed = (f"  - model: networks/{name}\n" + (f"    data: {own}\n" if own else "") for name, own in models.items())
    named = (f"    {name}: {{path: data/{name}.csv, samples: {count}}}\n" for name, count in data.items())
    calibration = f"calibration:\n  adapter: {Path(__file__).with_name('digits_adapter.py')}\n  data:\n{''.join(named)}"
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"merge_method: {method}\nmodels:\n{''.join(listed)}{calibration if data else ''}{more}")
    run(build(load_recipe(recipe)), folder / "out", force=True, trust_code=True)
    return load(folder / "out")


def kept(folder: Path, name: str, weights: Weights) -> str:
    """Keep a network under a name that a path may have; returns the name."""
    name = name.replace(",", "").replace(" ", "-")
    save(weights, folder / "networks" / name)
    return name


def listed(folder: Path, name: str, images: Data) -> None:
    """Keep images as a CSV file that the adapter reads."""
    (folder / "data").mkdir(exist_ok=True)
    rows = np.column_stack([images.x.numpy() * 16, images.y.numpy()])
    np.savetxt(folder / "data" / f"{name}.csv", rows, fmt="%.6g", delimiter=",")


def in_sequence(seed: int, folder: Path) -> Rows:
    """DAM's protocol: fine-tunes of one base on two, four and eight changes of the digits, one head."""
    base = train(task("plain"), seed, he(seed))
    tasks = [task(name) for name in MANY]
    experts = [train(own, seed, base, TUNING_STEPS) for own in tasks]
    names = [kept(folder, own.name, weights) for own, weights in zip(tasks, experts, strict=True)]
    for name, own in zip(names, tasks, strict=True):
        listed(folder, name, own.train)
    rows: Rows = {}
    for n in (2, 4, 8):
        own = {name: name for name in names[:n]}
        found = {"average": merged(folder, "linear", dict.fromkeys(own, ""), {}, "parameters: {weight: 1}\n")}
        found["RegMean as in digits.py, all images"] = regmean(experts[:n], [each.train for each in tasks[:n]])
        for count in (ALL, IMAGES, 32):
            for row, text in (("RegMean", ""), ("RegMean in sequence", "parameters: {sequential: true}\n")):
                title = f"{row}, {'all' if count == ALL else count} images"
                found[title] = merged(folder, "regmean", own, dict.fromkeys(own, count), text)
        for row, weights in found.items():
            rows.setdefault(row, {})[f"{n} tasks"] = float(np.mean([accuracy(weights, t.test) for t in tasks[:n]]))
    return rows


def soups(seed: int, folder: Path) -> Rows:
    """Fine-tunes of one base for noisy digits, of more and fewer steps, and some that were tuned for something else."""
    base = train(task("plain"), seed, he(seed))
    noisy, other = task("noisy"), task("inverted")
    half = len(noisy.test.x) // 2
    held_out = Data(noisy.test.x[:half], noisy.test.y[:half])
    listed(folder, "held-out", held_out)
    test = Data(noisy.test.x[half:], noisy.test.y[half:])

    def tuned(number: int, own: Task, steps: int) -> Weights:
        few = replace(own, train=Data(own.train.x[number % 5 :: 5], own.train.y[number % 5 :: 5]))
        return train(few, seed + OTHER + number, base, steps)

    good = [tuned(i, noisy, steps) for i, steps in enumerate((50, 100, 200, 300, 500))]
    bad = [tuned(i, other, 300) for i in range(2)]
    rows: Rows = {}
    for column, networks in (("5 fine-tunes", good), ("5, and 2 for another task", good + bad)):
        names = dict.fromkeys((kept(folder, f"soup {i}", each) for i, each in enumerate(networks)), "")
        held = {"held-out": half}
        found = {
            "the best on held-out images, alone": max(networks, key=lambda weights: accuracy(weights, held_out)),
            "average": merged(folder, "linear", names, {}, "parameters: {weight: 1}\n"),
            "greedy soup, by loss": merged(folder, "greedy_soup", names, held),
            "greedy soup, by accuracy": merged(folder, "greedy_soup", names, held, "evaluate: {metric: accuracy}\n"),
        }
        for row, weights in found.items():
            rows.setdefault(row, {})[column] = accuracy(weights, test)
    return rows


def main() -> None:
    """Run both for every seed and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many times all is repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every run
    try:
        fetch()
    except UnavailableError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MERGETOOL_CACHE"] = f"{folder}/cache"
        for title, protocol in (("Fine-tunes of one base, one head", in_sequence), ("Noisy digits", soups)):
            table = Table(title)
            for seed in range(options.seeds):
                own = Path(folder) / f"{protocol.__name__}-{seed}"
                own.mkdir()
                table.add(protocol(seed, own))
            print(f"\n{table.markdown()}", flush=True)


if __name__ == "__main__":
    main()
