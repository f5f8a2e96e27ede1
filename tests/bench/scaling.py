"""A model, one almost four times larger, and one enormous tensor: time grows with the bytes, memory does not."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .checkpoints import SIZES, make, shapes, weights
from .markdown import NONE, mark, median, number, ratio, spread, table
from .measure import remove
from .work import Bench, Costs, Work, compile_kernels, rotated, tell

METHODS = ("linear", "ties")
WHO = ("mergetool", "floor")
"""Who is measured; the floor moves the same bytes and computes nothing, so it shows what the disk allows."""
SIZES_EXPECTED, EXPECTED = ("1.1b", "4b"), (3.5, 4.2)
"""Engine seconds of 4 B weights over those of 1.1 B: the weights are 3.6 times as many."""
CLOSE = 0.1
"""Memory stays within this share of that of 1.1 B weights."""
MARGIN = 2_000_000_000
"""Bytes of the disk that are left alone."""


@dataclass(frozen=True)
class Step:
    """A model of the comparison."""

    label: str
    size: str
    tensors: Mapping[str, tuple[int, ...]]
    kept: bool = False
    """Whether its files stay for other sections."""

    @property
    def nbytes(self) -> int:
        """The bytes of its weights."""
        return 2 * weights(self.tensors)


def steps(size: str) -> list[Step]:
    """The first is what the others are compared with; small ones for a small size, to try this out."""
    small = size in ("tiny", "100m")
    first, second, one = ("tiny", "100m", 1 << 24) if small else ("1.1b", "4b", 1 << 29)
    return [
        Step(first, first, dict(shapes(SIZES[first])), kept=True),
        Step("one tensor", "tiny", {"w": (one,)}),
        Step(second, second, dict(shapes(SIZES[second])), kept=small),
    ]


def measure(bench: Bench) -> dict[str, Any]:
    """Merge each model with its sources out of the page cache, which would not hold the largest."""
    compile_kernels(bench, METHODS)
    costs: dict[str, dict[str, Costs]] = {who: defaultdict(lambda: defaultdict(list)) for who in WHO}
    skipped = {}
    ladder = steps(bench.size)
    for step in ladder:
        for name in METHODS:
            work = Work(name, [bench.folder / f"{step.label.replace(' ', '-')}-{v}" for v in range(3)], bench.folder)
            if short := prepare(step, work):
                skipped[f"{name}, {step.label}"] = short
                print(f"{name} · {step.label}: left out, {short}", flush=True)
                continue
            for repeat in range(bench.repeats):
                for who in rotated(WHO, repeat):
                    cost = work.cost(who, state="evicted")
                    costs[who][name][step.label].append(cost)
                    tell(name, step.label, who, cost)
        if not step.kept:
            for model in work.models:
                remove(model)
    settings = {"repeats": bench.repeats, "weights": {step.label: weights(step.tensors) for step in ladder}}
    found = {who: {name: dict(of_step) for name, of_step in of_work.items()} for who, of_work in costs.items()}
    return {"settings": settings, "skipped": skipped, "costs": found}


def prepare(step: Step, work: Work) -> str:
    """Make the models that the work merges; why not, if the disk is short even without those it does not merge."""
    missing = [variant for variant in work.variants if not (work.models[variant] / "config.json").exists()]
    if (short := shortage(step.nbytes, len(missing), shutil.disk_usage(work.folder).free)) and not step.kept:
        for variant in set(range(3)) - set(work.variants):
            remove(work.models[variant])
        short = shortage(step.nbytes, len(missing), shutil.disk_usage(work.folder).free)
    if short:
        return short
    for variant in missing:
        remove(work.models[variant])
        make(work.models[variant], step.size, variant, step.tensors)
    return ""


def shortage(nbytes: int, missing: int, free: int) -> str:
    """Why models and an output of so many bytes do not fit, if they do not."""
    wanted = nbytes * (missing + 1) + MARGIN
    return "" if free >= wanted else f"{wanted / 1e9:.1f} GB of disk are needed and {free / 1e9:.1f} GB are free"


def growth(costs: Mapping[str, Mapping[str, Costs]], counts: Mapping[str, int]) -> str:
    """Seconds and memory by model, with the first one's as measure; the floor's beside."""
    first = next(iter(counts))
    head = [
        *("work", "model", "weights", "× weights", "wall s", "engine s", "× engine", ""),
        *("floor s", "× floor", "engine / floor", "memory MB", "× memory", ""),
    ]
    rows = []
    for name, found in costs["mergetool"].items():
        floor = costs["floor"].get(name, {})
        for label, count in counts.items():
            here, bare = found.get(label), floor.get(label)
            times, memory, slower = (
                ratio(median(of.get(label), key), median(of.get(first), key)) if label != first else None
                for of, key in ((found, "engine_s"), (found, "anonymous_MB"), (floor, "engine_s"))
            )
            expected = mark(times, *EXPECTED) if (first, label) == SIZES_EXPECTED else NONE
            over = ratio(median(here, "engine_s"), median(bare, "engine_s"))
            rows.append(
                [
                    *(f"`{name}`", label, f"{count / 1e9:.3g} B", number(count / counts[first])),
                    *(spread(here, "wall_s"), spread(here, "engine_s"), number(times), expected),
                    *(spread(bare, "engine_s"), number(slower), number(over)),
                    *(spread(here, "anonymous_MB"), number(memory), mark(memory, 1 - CLOSE, 1 + CLOSE)),
                ]
            )
    return table(head, rows)


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    counts = results["settings"]["weights"]
    first = next(iter(counts))
    less, more = SIZES_EXPECTED
    said = (
        f"Sources not in the page cache; medians (least–most). Engine seconds of {more} over those of {less} are "
        f"expected from {EXPECTED[0]} to {EXPECTED[1]}, memory within {CLOSE:.0%} of that of {first}. The *floor* "
        "reads and writes the same bytes with the same primitives and computes nothing: what it takes longer for the "
        "larger model is the disk's and the page cache's."
    )
    return "\n\n".join([said, growth(results["costs"], counts), *left_out(results["skipped"])])


def left_out(skipped: Mapping[str, str]) -> Iterable[str]:
    """What the disk had no room for."""
    return [f"Left out: {what}; {why}." for what, why in skipped.items()]
