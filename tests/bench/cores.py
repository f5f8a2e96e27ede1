"""From one worker to as many as a machine of many cores has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from . import workers
from .markdown import median, number, ratio, spread, table
from .work import Bench, Costs


def counts(cores: int) -> list[str]:
    """Powers of two up to the number of cores."""
    return [str(1 << n) for n in range(cores.bit_length())]


def measure(bench: Bench) -> dict[str, Any]:
    """Run every piece of work with each number of workers, page cache warm."""
    return workers.measure(bench, counts(len(os.sched_getaffinity(0))))


def speedups(costs: Mapping[str, Costs], every: Sequence[str]) -> str:
    """Engine seconds by the number of workers, and how many times faster more are than one."""
    head = ["work", *(f"{count} s" for count in every), *(f"{count} over 1" for count in every[1:]), ""]
    rows = []
    for name, found in costs.items():
        middle = [median(found.get(count), "engine_s") for count in every]
        faster = [ratio(middle[0], each) for each in middle[1:]]
        met = workers.mark(faster[0], workers.EXPECTED) if name in workers.COMPUTES and faster else workers.NONE
        seconds = (spread(found.get(count), "engine_s") for count in every)
        rows.append([f"`{name}`", *seconds, *map(number, faster), met])
    return table(head, rows)


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    said = (
        "Engine seconds with more and more workers, sources and outputs in memory, medians (least–most), and how many "
        f"times faster more are than one; of two {workers.EXPECTED} is expected where the processor bounds a merge. "
        "Two writers write what all workers make, one core each."
    )
    return f"{said}\n\n{speedups(results['costs'], counts(results['settings']['cores']))}"
