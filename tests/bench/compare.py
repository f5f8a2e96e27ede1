"""mergekit, mergetool and the floor side by side: every piece of work, warm and cold, in one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .markdown import gigabytes, mark, median, number, ratio, spread, table
from .measure import chill
from .work import COMPARATOR, Bench, Costs, Work, compile_kernels, rotated, tell


@dataclass(frozen=True)
class Target:
    """What a piece of work is to reach."""

    faster: float
    """Times faster than mergekit, whole process, at least."""
    floor: float
    """Engine time over the floor's, warm, at most."""


TARGETS = {
    "linear": Target(6.5, 1.5),
    "slerp": Target(10, 2),
    "task_arithmetic": Target(7, 1.5),
    "dare_ties": Target(35, 2),
    "ties": Target(60, 2),
    "ties scope model": Target(45, 2.5),
}
COLD = 1.3
"""Cold engine time over the cold floor's, at most."""
WHO = ("mergekit", "mergetool", "floor")
All = Mapping[str, Costs]


def measure(bench: Bench) -> dict[str, Any]:
    """Run everything, interleaved, in an order that turns from repeat to repeat."""
    models = bench.models()
    compile_kernels(bench, bench.methods)
    if bench.mergekit:  # its libraries come from the disk only once
        Work("linear", bench.models("tiny"), bench.folder).cost("mergekit", mergekit=bench.mergekit)
    costs: dict[str, Costs] = defaultdict(lambda: defaultdict(list))
    for repeat in range(bench.repeats):
        for name in bench.methods:
            work = Work(name, models, bench.folder)
            for state in ("warm", "cold") if bench.cold else ("warm",):
                theirs = bench.mergekit and name not in COMPARATOR and repeat < bench.mergekit_repeats
                present = [who for who in WHO if who != "mergekit" or (theirs and state == "warm")]
                for who in rotated(present, repeat):
                    label = f"{who} cold" if state == "cold" else who
                    cost = work.cost(who, mergekit=bench.mergekit, state=state)
                    costs[name][label].append(cost)
                    tell(name, label, cost)
    settings: dict[str, Any] = {"size": bench.size, "repeats": bench.repeats}
    if bench.mergekit:
        settings["mergekit repeats"] = bench.mergekit_repeats
    if bench.cold:
        settings["cold"] = chill([])
    return {"settings": settings, "costs": {name: dict(found) for name, found in costs.items()}}


def rival(costs: All, name: str) -> list[dict[str, float]]:
    """The costs of mergekit for a piece of work, or for what it has that comes nearest."""
    return costs.get(COMPARATOR.get(name, name), {}).get("mergekit", [])


def speed(costs: All) -> str:
    """The whole process against mergekit's."""
    head = ["work", "mergekit s", "mergetool s", "faster by", "at least", "", "that is s", "floor s"]
    rows = []
    for name, found in costs.items():
        theirs, ours = rival(costs, name), found.get("mergetool", [])
        faster, target = ratio(median(theirs, "wall_s"), median(ours, "wall_s")), TARGETS[name].faster
        both = spread(theirs, "wall_s"), spread(ours, "wall_s")
        needed, floor = ratio(median(theirs, "wall_s"), target), median(found.get("floor", []), "wall_s")
        marked = [number(faster), f"{target:g}", mark(faster, least=target)]
        rows.append([f"`{name}`", *both, *marked, number(needed), number(floor)])
    return table(head, rows)


def against_floor(costs: All, cold: bool = False) -> str:
    """The engine against the floor, with warm or with cold sources."""
    label = " cold" if cold else ""
    head = ["work", f"engine{label} s", f"floor{label} s", "engine / floor", "at most", ""]
    rows = []
    for name, found in costs.items():
        engine, floor = found.get(f"mergetool{label}", []), found.get(f"floor{label}", [])
        over = ratio(median(engine, "engine_s"), median(floor, "engine_s"))
        target = COLD if cold else TARGETS[name].floor
        both = spread(engine, "engine_s"), spread(floor, "engine_s")
        rows.append([f"`{name}`", *both, number(over), f"{target:g}", mark(over, most=target)])
    return table(head, rows)


def resources(costs: All) -> str:
    """What everybody takes besides time, page cache warm: processor, memory, bytes."""
    head = ["work", "who", "user + sys s", "memory MB", "sources read GB", "by calls, read GB", "by calls, written GB"]
    rows = []
    for name, found in costs.items():
        for who in (who for who in WHO if found.get(who)):
            cost = found[who]
            rows.append(
                [
                    f"`{name}`",
                    who,
                    spread(cost, "user_s", "system_s"),
                    spread(cost, "anonymous_MB"),
                    gigabytes(median(cost, "source_read_MB")),
                    gigabytes(median(cost, "called_read_MB")),
                    gigabytes(median(cost, "called_written_MB")),
                ]
            )
    return table(head, rows)


def summary(costs: All) -> str:
    """The comparison with mergekit for the README: medians of the whole process."""
    head = ["work", "mergekit 0.1.5", "mergetool", "faster by", "memory, mergekit", "memory, mergetool"]
    rows = []
    for name, found in costs.items():
        theirs, ours = found.get("mergekit"), found.get("mergetool")
        if theirs and ours:
            walls = median(theirs, "wall_s"), median(ours, "wall_s")
            memory = [f"{median(who, 'anonymous_MB'):.0f} MB" for who in (theirs, ours)]
            times = [f"{number(wall)} s" for wall in walls]
            rows.append([f"`{name}`", *times, f"{number(ratio(*walls))}×", *memory])
    return table(head, rows)


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    costs: All = results["costs"]
    parts = [
        "Medians (least–most). Seconds of the whole process, start-up included, page cache warm. "
        "mergekit has no `scope: model`; its `ties` stands in for it. *That is* how long the whole process may take to "
        "be so much faster than mergekit here, and *floor* how long the floor's whole process takes, which computes "
        "nothing.",
        speed(costs),
        "*Engine* is mergetool without its start-up. The *floor* reads every source byte once and writes every output "
        "byte once with the same primitives, waits for the disk, and computes nothing.",
        against_floor(costs),
    ]
    if any("mergetool cold" in found for found in costs.values()):
        parts += [
            f"The same cold: {results['settings']['cold']}.",
            against_floor(costs, cold=True),
        ]
    parts += [
        "Memory is peak anonymous memory. *Sources read* counts every pass. Of what is read by calls a process's own "
        "start-up is part; files that are mapped into memory, as mergekit's sources are, are not.",
        resources(costs),
        "![Seconds of the whole process](benchmarks.png)",
    ]
    return "\n\n".join(parts)
