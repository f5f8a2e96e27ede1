"""One worker and more on every piece of work: what another core buys, here and on a machine of many cores."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import NONE, mark, median, number, ratio, spread, table
from .work import Bench, Costs, Work, compile_kernels, rotated, tell

COUNTS = ("1", "2", "3")
COMPUTES = ("dare_ties", "ties", "ties scope model")
"""The work that waits for the processor and not for the disk."""
EXPECTED = 1.7
"""How many times faster two workers are than one at such work."""


def measure(bench: Bench, counts: Sequence[str] = COUNTS) -> dict[str, Any]:
    """Run every piece of work with each number of workers, page cache warm."""
    models = bench.models()
    compile_kernels(bench, bench.methods)
    costs: dict[str, Costs] = defaultdict(lambda: defaultdict(list))
    for repeat in range(bench.repeats):
        for name in bench.methods:
            work = Work(name, models, bench.folder)
            for workers in rotated(counts, repeat):
                cost = work.cost("mergetool", "--workers", workers)
                costs[name][workers].append(cost)
                tell(name, f"workers {workers}", cost)
    settings = {"size": bench.size, "repeats": bench.repeats, "cores": len(os.sched_getaffinity(0))}
    return {"settings": settings, "costs": {name: dict(found) for name, found in costs.items()}}


def speedups(costs: Mapping[str, Costs]) -> str:
    """Engine seconds by the number of workers, how much faster two are than one, and how much they could be."""
    head = ["work", *(f"{count} s" for count in COUNTS), "2 over 1", "", "3 over 1"]
    head += ["processor s, 1", "processor s, 2", "2 over 1 at most"]
    rows = []
    for name, found in costs.items():
        middle = {count: median(found.get(count), "engine_s") for count in COUNTS}
        two, three = (ratio(middle["1"], middle[count]) for count in ("2", "3"))
        alone, both = (median(_busy(found.get(count)), "busy_s") for count in ("1", "2"))
        most = ratio(middle["1"], both / 2 if both else None)
        met = mark(two, EXPECTED) if name in COMPUTES else NONE
        seconds = (spread(found.get(count), "engine_s") for count in COUNTS)
        rows.append([f"`{name}`", *seconds, number(two), met, *map(number, (three, alone, both, most))])
    return table(head, rows)


def _busy(costs: Sequence[Mapping[str, float]] | None) -> list[dict[str, float]]:
    """The processor time of each run without that of its start-up, which waits for nothing."""
    return [{"busy_s": c["user_s"] + c["system_s"] - (c["wall_s"] - c["engine_s"])} for c in costs or ()]


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    return "\n\n".join(
        [
            "Engine seconds with 1, 2 and 3 workers, page cache warm; medians (least–most), and how many times faster "
            "more workers are than one. By default there is one to a core; writers are further threads, so that one "
            "worker keeps more than a core busy. *Processor* is the time of all of a run's threads, start-up left "
            f"out, and *at most* what two workers would gain if neither core ever waited. {EXPECTED} is expected "
            "where the processor bounds a merge.",
            speedups(results["costs"]),
            "![Engine seconds by workers](benchmarks-workers.png)",
        ]
    )
