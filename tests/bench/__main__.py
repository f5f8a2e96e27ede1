"""mergekit, mergetool and the floor, side by side in one run.

    python -m tests.bench                          1.1 B parameters, every method, three repeats
    python -m tests.bench --size 100m --repeats 1  a quick look
    python -m tests.bench --no-mergekit --cold     ours alone, warm and cold

Writes docs/benchmarks.md, docs/benchmarks.json and docs/benchmarks.png with `--write`. Checkpoints are made in
`$MERGETOOL_BENCH`, by default ~/.cache/mergetool/bench: 6.6 GB for the 1.1 B size, and as much again for outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tests.bench.checkpoints import SIZES, make
from tests.bench.measure import Cost, drop_caches, run, warm

RECIPES = {
    "linear": {"parameters": {"weight": 0.5}},
    "slerp": {"parameters": {"t": 0.4}},
    "task_arithmetic": {"parameters": {"weight": 0.5}},
    "dare_ties": {"parameters": {"weight": 0.5, "density": 0.5}},
    "ties": {"parameters": {"weight": 0.5, "density": 0.3}},
    "ties scope model": {"parameters": {"weight": 0.5, "density": 0.3, "scope": "model"}},
}
"""The work, by name; the first word is the method."""
ROOT = Path(__file__).parent.parent.parent


def recipe(name: str, models: list[Path]) -> str:
    """The recipe of one piece of work; JSON is YAML."""
    method = name.split()[0]
    base, first, second = (str(model) for model in models)
    listed = {"linear": [first, second], "slerp": [base, first]}.get(method, [first, second])
    content = {"merge_method": method, "models": [{"model": model} for model in listed], "dtype": "bfloat16"}
    if method != "linear":
        content["base_model"] = base
    return json.dumps({**content, **RECIPES[name]}, indent=1)


def sources(name: str, models: list[Path]) -> list[Path]:
    """The weight files that a piece of work reads."""
    read = {"linear": models[1:], "slerp": models[:2]}.get(name.split()[0], models)
    return [model / "model.safetensors" for model in read]


def contestants(name: str, folder: Path, models: list[Path], mergekit: str | None) -> Iterator[tuple[str, list[str]]]:
    """Everybody's command for a piece of work."""
    path = folder / f"{name.replace(' ', '-')}.yaml"
    path.write_text(recipe(name, models))
    out = str(folder / "out")
    if mergekit is not None and "scope" not in name:
        yield "mergekit", [mergekit, str(path), out, "--quiet"]
    yield "mergetool", [sys.executable, "-m", "mergetool.cli", "run", "--json", "--quiet", str(path), out]
    files = [str(file) for file in sources(name, models)]
    yield "floor", [sys.executable, "-m", "tests.bench.floor", f"{folder}/floor.safetensors", *files]


def measure(
    args: argparse.Namespace, folder: Path, mergekit: str | None
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Run everything, interleaved; the costs by work and contestant."""
    models = [make(folder / f"{args.size}-{variant}", args.size, variant) for variant in range(3)]
    costs: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for repeat in range(args.repeats):
        for name in args.methods:
            for cold in (False, True) if args.cold else (False,):
                for who, command in contestants(name, folder, models, mergekit):
                    if who == "mergekit" and (cold or repeat >= args.mergekit_repeats):
                        continue
                    shutil.rmtree(folder / "out", ignore_errors=True)
                    warm(sources(name, models))
                    if cold and not drop_caches():
                        sys.exit("cannot drop the page cache here; leave out --cold")
                    label = f"{who} cold" if cold else who
                    found = described(who, run(command, {"PYTHONPATH": str(ROOT)}))
                    costs[name][label].append(found)
                    print(f"{name:18} {label:15} " + "  ".join(f"{k} {v:.3g}" for k, v in found.items()), flush=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "floor.safetensors").unlink(missing_ok=True)
    return {name: dict(found) for name, found in costs.items()}


def described(who: str, cost: Cost) -> dict[str, float]:
    """A cost as numbers; of mergetool also the time without start-up, of the floor only that."""
    found = {"wall_s": cost.wall, "cpu_s": cost.cpu, "anonymous_MB": cost.anonymous / 1e6}
    if who == "mergetool":
        found["engine_s"] = json.loads(cost.output)["seconds"]
    if who == "floor":
        found["engine_s"] = float(cost.output)
    return found


def table(costs: dict[str, dict[str, list[dict[str, float]]]], cold: bool) -> str:
    """Medians and ratios as Markdown."""
    head = ["work", "mergekit s", "mergetool s", "faster by", "engine s", "floor s", "engine / floor", "memory MB"]
    if cold:
        head += ["cold engine s", "cold floor s", "cold ratio"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, found in costs.items():

        def median(who: str, key: str, found: dict[str, list[dict[str, float]]] = found) -> float | None:
            return statistics.median(cost[key] for cost in found[who]) if found.get(who) else None

        kit, wall = median("mergekit", "wall_s"), median("mergetool", "wall_s")
        engine, floor = median("mergetool", "engine_s"), median("floor", "engine_s")
        cells = [kit, wall, kit / wall if kit and wall else None, engine, floor, engine / floor if floor else None]
        if cold:
            engine, floor = median("mergetool cold", "engine_s"), median("floor cold", "engine_s")
            tail = [engine, floor, engine / floor if floor else None]
        else:
            tail = []
        memory = median("mergetool", "anonymous_MB")
        rows.append([f"`{name}`", *(_cell(x) for x in cells), f"{memory:.0f}", *(_cell(x) for x in tail)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary(costs: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The comparison with mergekit for the README: medians of the whole process."""
    rows = [["work", "mergekit 0.1.5", "mergetool", "faster by", "memory, mergekit", "memory, mergetool"]]
    rows.append(["---", *["---:"] * 5])
    for name, found in costs.items():
        if found.get("mergekit"):
            kit, ours = (
                {key: statistics.median(cost[key] for cost in found[who]) for key in ("wall_s", "anonymous_MB")}
                for who in ("mergekit", "mergetool")
            )
            rows.append(
                [
                    f"`{name}`",
                    f"{_cell(kit['wall_s'])} s",
                    f"{_cell(ours['wall_s'])} s",
                    f"{_cell(kit['wall_s'] / ours['wall_s'])}×",
                    f"{kit['anonymous_MB']:.0f} MB",
                    f"{ours['anonymous_MB']:.0f} MB",
                ]
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def machine() -> str:
    """The machine and the versions, in a line."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("mergetool", "numpy", "numba"))
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}, {packages}"


def write(args: argparse.Namespace, costs: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Write the page, the numbers and the plot."""
    docs = ROOT / "docs"
    text = f"""# Benchmarks

Made by `python -m tests.bench {" ".join(sys.argv[1:])}` on {date.today()}: Llama-shaped checkpoints, {args.size}
parameters, bfloat16, deltas half of which are exactly zero; medians of {args.repeats} interleaved runs (mergekit 0.1.5:
{args.mergekit_repeats}), page cache warm unless it says cold. {machine()}.

Seconds are of the whole process; *engine* is mergetool without its start-up; the *floor* reads every source byte and
writes every output byte with the same primitives and computes nothing. Memory is peak anonymous memory.

{table(costs, args.cold)}

![Seconds of the whole process](benchmarks.png)
"""
    (docs / "benchmarks.md").write_text(text)
    page = (ROOT / "README.md").read_text()
    begin, end = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
    before, after = page.split(begin)[0], page.split(end)[1]
    (ROOT / "README.md").write_text(f"{before}{begin}\n{summary(costs)}\n{end}{after}")
    (docs / "benchmarks.json").write_text(json.dumps({"machine": machine(), "costs": costs}, indent=1) + "\n")
    plot(costs, docs / "benchmarks.png")


def plot(costs: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Draw the seconds of the whole process as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.7 * len(costs) + 1))
    for i, (who, key) in enumerate((("mergekit", "wall_s"), ("mergetool", "wall_s"), ("floor", "engine_s"))):
        places, values = [], []
        for row, found in enumerate(costs.values()):
            if found.get(who):
                places.append(row + (i - 1) * 0.27)
                values.append(statistics.median(cost[key] for cost in found[who]))
        bars = axes.barh(places, values, 0.25, label=who)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_yticks(range(len(costs)), list(costs))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds, whole process (logarithmic)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the arguments, measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit-repeats", type=int, default=1)
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--cold", action="store_true", help="also with the page cache dropped (needs root)")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.*")
    args = parser.parse_args()
    folder = Path(os.environ.get("MERGETOOL_BENCH") or Path.home() / ".cache" / "mergetool" / "bench")
    folder.mkdir(parents=True, exist_ok=True)
    mergekit = None
    if not args.no_mergekit:
        sys.path.insert(0, str(ROOT / "tests"))
        from judge.mergekit_env import mergekit_yaml

        found, reason = mergekit_yaml()
        mergekit = str(found) if found else sys.exit(f"no mergekit: {reason}; leave it out with --no-mergekit")
    costs = measure(args, folder, mergekit)
    print(table(costs, args.cold))
    if args.write:
        write(args, costs)


if __name__ == "__main__":
    main()
