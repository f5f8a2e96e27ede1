"""One, two and three workers on every piece of work: what another core buys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from .markdown import median, number, ratio, spread, table
from .work import Bench, Costs, Work, compile_kernels, rotated, tell

COUNTS = ("1", "2", "3")


def measure(bench: Bench) -> dict[str, Any]:
    """Run every piece of work with each number of workers, page cache warm."""
    models = bench.models()
    compile_kernels(bench, bench.methods)
    costs: dict[str, Costs] = defaultdict(lambda: defaultdict(list))
    for repeat in range(bench.repeats):
        for name in bench.methods:
            work = Work(name, models, bench.folder)
            for workers in rotated(COUNTS, repeat):
                cost = work.cost("mergetool", "--workers", workers)
                costs[name][workers].append(cost)
                tell(name, f"workers {workers}", cost)
    settings = {"size": bench.size, "repeats": bench.repeats}
    return {"settings": settings, "costs": {name: dict(found) for name, found in costs.items()}}


def speedups(costs: Mapping[str, Costs]) -> str:
    """Engine seconds by the number of workers, and how much faster two are than one."""
    head = ["work", *(f"{count} s" for count in COUNTS), "2 over 1", "3 over 1"]
    rows = []
    for name, found in costs.items():
        middle = {count: median(found.get(count), "engine_s") for count in COUNTS}
        gains = [number(ratio(middle["1"], middle[count])) for count in ("2", "3")]
        rows.append([f"`{name}`", *(spread(found.get(count), "engine_s") for count in COUNTS), *gains])
    return table(head, rows)


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    return "\n\n".join(
        [
            "Engine seconds with 1, 2 and 3 workers, page cache warm; medians (least–most), and how many times faster "
            "more workers are than one. By default there is one to a core; writers are further threads.",
            speedups(results["costs"]),
            "![Engine seconds by workers](benchmarks-workers.png)",
        ]
    )
