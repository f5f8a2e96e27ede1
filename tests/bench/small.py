"""Many small tensors: what every tensor costs besides its bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from .checkpoints import make, many, weights
from .markdown import median, number, ratio, spread, table
from .work import Bench, Costs, Work, compile_kernels, rotated, tell

COUNTS = {"tiny": 500, "100m": 5000}
"""How many tensors where it is not as many as below."""
COUNT = 20_000
METHODS = ("linear", "ties")


def measure(bench: Bench) -> dict[str, Any]:
    """Merge thousands of tensors of 4 KiB to 64 KiB, page cache warm, and copy them as the floor does."""
    count = COUNTS.get(bench.size, COUNT)
    tensors = many(count)
    models = [make(bench.folder / f"small-{count}-{variant}", "tiny", variant, tensors) for variant in range(3)]
    compile_kernels(bench, METHODS)
    costs: dict[str, Costs] = defaultdict(lambda: defaultdict(list))
    for repeat in range(bench.repeats):
        for name in METHODS:
            work = Work(name, models, bench.folder)
            for who in rotated(("mergetool", "floor"), repeat):
                cost = work.cost(who)
                costs[name][who].append(cost)
                tell(name, f"{count} tensors", who, cost)
    settings = {"tensors": count, "MB": round(2 * weights(tensors) / 1e6, 1), "repeats": bench.repeats}
    return {"settings": settings, "costs": {name: dict(found) for name, found in costs.items()}}


def each(costs: Mapping[str, Costs], count: int) -> str:
    """Seconds, and milliseconds for each tensor."""
    head = ["work", "mergetool s", "engine s", "floor s", "engine / floor", "engine ms a tensor", "floor ms a tensor"]
    rows = []
    for name, found in costs.items():
        ours, floor = found.get("mergetool"), found.get("floor")
        middle = [median(who, "engine_s") for who in (ours, floor)]
        milli = [number(None if seconds is None else 1000 * seconds / count) for seconds in middle]
        seconds = spread(ours, "wall_s"), spread(ours, "engine_s"), spread(floor, "engine_s")
        rows.append([f"`{name}`", *seconds, number(ratio(*middle)), *milli])
    return table(head, rows)


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    settings = results["settings"]
    said = (
        f"{settings['tensors']} tensors of 4 KiB to 64 KiB, {settings['MB']:g} MB a model, page cache warm; medians "
        "(least–most). The floor copies the file in pieces of 2 MiB and knows nothing of tensors."
    )
    return "\n\n".join([said, each(results["costs"], settings["tensors"])])
