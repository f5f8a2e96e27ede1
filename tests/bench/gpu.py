"""A GPU: what its link carries, how much of that kernels and merges use, and whether it makes what the CPU makes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from mergetool.execute.devices import backend_for, memory_for
from mergetool.kernels.backend import Backend
from mergetool.kernels.torch_arrays import TorchArrays
from mergetool.methods import METHODS
from mergetool.plan.memory import LARGEST_TILE

from .agreement import CLOSE, MEASURED, Agreement, every
from .kernels import Place, Timed, kernels
from .markdown import NONE, median, number, ratio, spread, table
from .work import Bench, Costs, Work, compile_kernels, rotated, tell

DEVICE = "cuda"
PIECE = 64 << 20
"""Bytes that go over the link at once when it is measured."""
REPEATS = 21
WORKERS = (1, 2, 4, 8)
MERGING = (2, 4)
"""Workers of whole merges."""
TORCH = "torch"
"""The column of torch's own operations."""
CALLS = 24
"""Tiles that each worker combines when kernels are measured."""
SOURCES = 2
MATRIX = 4096
"""Inputs and outputs of the matrix that is solved."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure the link, every kernel, whole merges with sources in the page cache, a matrix, and every example.

    Raises:
        SystemExit: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here")
    return {
        "settings": {"GPU": torch.cuda.get_device_name(), "torch": torch.__version__, "size": bench.size,
                     "repeats": bench.repeats},
        "link": link(torch),
        "kernels": rates(),
        "matrix": matrix(torch),
        "costs": merges(bench),
        "agreement": every(DEVICE),
    }  # fmt: skip


def link(torch: Any) -> dict[str, float]:
    """GB/s from pinned memory to the GPU, back, and to it while as much goes back."""
    here, there = (torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    on, off = (torch.empty(PIECE, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(2)]

    def to() -> None:
        with torch.cuda.stream(streams[0]):
            on.copy_(here, non_blocking=True)

    def back() -> None:
        with torch.cuda.stream(streams[1]):
            there.copy_(off, non_blocking=True)

    def rate(*moves: Callable[[], None]) -> float:
        took = []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for move in moves:
                move()
            torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
        return PIECE / statistics.median(took) / 1e9

    found = {"to": rate(to), "back": rate(back), "to while back": rate(to, back)}
    print(found, flush=True)
    return found


def rates() -> dict[str, dict[str, float]]:
    """GB/s of inputs that go to the GPU while kernels work on tiles, by the number of workers.

    And the most that torch's own operations reach, which are what there is without `cuda.core`.
    """
    every: dict[str, dict[str, float]] = {}
    for name, most, make in kernels():
        call = partial(make, min(SOURCES, most or SOURCES), "BF16")
        found = {str(workers): _rate(call, workers, backend_for(DEVICE)) for workers in WORKERS}
        found[TORCH] = max(_rate(call, workers, TorchArrays(DEVICE)) for workers in WORKERS[:2])
        nbytes = _inputs(name, min(SOURCES, most or SOURCES))
        every[name] = {key: rate * nbytes / 1e9 for key, rate in found.items()}
        print(name.ljust(20), {key: round(rate, 1) for key, rate in every[name].items()}, flush=True)
    return every


def _inputs(kernel: str, count: int) -> int:
    """Bytes that a kernel reads of a tile of bfloat16: the sources', the base's and what is known of each weight."""
    method = METHODS.get(kernel.removeprefix("sums: "))
    based = method is None or method.base == "required"
    facts = len(method.facts) if method is not None else 0
    return LARGEST_TILE * (2 * (count + based) + 4 * count * facts)


def _rate(make: Callable[[Place], Timed], workers: int, backend: Backend) -> float:
    """Tiles that workers go over side by side, each second."""
    calls = [make(Place(backend, memory_for(DEVICE))) for _ in range(workers)]

    def several(call: Timed) -> None:
        for _ in range(CALLS):
            call()

    took = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(4):
            began = time.perf_counter()
            list(pool.map(several, calls))
            took.append(time.perf_counter() - began)
    return workers * CALLS / statistics.median(took[1:])


def matrix(torch: Any) -> dict[str, float]:
    """Seconds in which RegMean solves a matrix of two sources on the CPU and on the GPU, copies included."""
    rng = np.random.default_rng(0)
    values = [torch.from_numpy(rng.standard_normal((MATRIX, MATRIX))) for _ in range(2)]
    inputs = [torch.from_numpy(rng.standard_normal((MATRIX + 64, MATRIX))) for _ in range(2)]
    grams = [x.T @ x / len(x) for x in inputs]
    method, found, made = METHODS["regmean"], {}, []
    for device in ("cpu", DEVICE):
        took = []
        for _ in range(4):
            began = time.perf_counter()
            there = [[each.to(device) for each in every] for every in (values, grams)]
            result = method(*there, weight=(1.0, 1.0), off_diagonal=0.9, ridge=1e-6, sequential=False).cpu()
            took.append(time.perf_counter() - began)
        made.append(result)
        found[device] = statistics.median(took[1:])
    found["relative"] = float((made[0] - made[1]).norm() / made[0].norm())
    print(found, flush=True)
    return found


def merges(bench: Bench) -> dict[str, Costs]:
    """Every piece of work on the GPU and on the CPU, and the floor."""
    models = bench.models()
    compile_kernels(bench, bench.methods)
    options = {"cpu": ["--device", "cpu"], **{f"gpu {n}": ["--device", DEVICE, "--workers", str(n)] for n in MERGING}}
    costs: dict[str, Costs] = defaultdict(lambda: defaultdict(list))
    for repeat in range(bench.repeats):
        for name in bench.methods:
            work = Work(name, models, bench.folder)
            for who in rotated([*options, "floor"], repeat):
                cost = work.cost("floor") if who == "floor" else work.cost("mergetool", *options[who])
                costs[name][who].append(cost)
                tell(name, who, cost)
    return {name: dict(found) for name, found in costs.items()}


def of_the_link(results: Mapping[str, Any]) -> str:
    """What of the link kernels use that are fed from memory."""
    most = results["link"]["to"]
    by_workers = (f"{n} workers" if n > 1 else "1 worker" for n in WORKERS)
    head = ["kernel", *by_workers, "of the link", "torch's own operations"]
    rows = []
    for name, found in results["kernels"].items():
        ours = [found[str(n)] for n in WORKERS]
        rows.append([f"`{name}`", *map(number, ours), f"{max(ours) / most:.0%}", number(found[TORCH])])
    return table(head, rows)


def whole(results: Mapping[str, Any]) -> str:
    """Seconds of merges, and what of the link the best of them uses on the way to the GPU."""
    most = results["link"]["to"]
    head = ["work", *(f"GPU, {n} workers s" for n in MERGING), "CPU s", "floor s", "GB/s", "of the link", "floor's"]
    rows = []
    for name, found in results["costs"].items():
        best = min((f"gpu {n}" for n in MERGING if f"gpu {n}" in found), key=lambda who: median(found[who], "engine_s"))
        moved = [
            ratio(median(found[who], "source_read_MB"), 1e3 * (median(found[who], "engine_s") or 0))
            for who in (best, "floor")
        ]
        shares = [NONE if rate is None else f"{rate / most:.0%}" for rate in moved]
        seconds = [spread(found.get(who), "engine_s") for who in (*(f"gpu {n}" for n in MERGING), "cpu", "floor")]
        rows.append([f"`{name}`", *seconds, number(moved[0]), *shares])
    return table(head, rows)


def alike(results: Mapping[str, Any]) -> str:
    """How the outputs of the examples differ."""
    head = ["example", "weights", "not equal", "steps apart at most", "relative difference", ""]
    rows = []
    for name, numbers in results["agreement"].items():
        if "wrong" in numbers:
            rows.append([f"`{name}`", *[NONE] * 4, "**failed**"])
            continue
        found = Agreement(**numbers)
        within = "as expected" if found.within(name) else "**further apart**"
        apart = [f"{found.weights:,}", f"{found.unequal:,}", str(found.steps), f"{found.relative:.1e}"]
        rows.append([f"`{name}`", *apart, within])
    return table(head, rows)


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    over, solved = results["link"], results["matrix"]
    said = [
        f"The link carries {number(over['to'])} GB/s from pinned memory to the GPU, {number(over['back'])} back, and "
        f"{number(over['to while back'])} each way when both are wanted.",
        f"Kernels fed from pinned memory, tiles of {LARGEST_TILE} weights of {SOURCES} bfloat16 sources, results "
        "copied back; what is known of each weight of `fisher`, `dam` and `greedy_soup` comes from ordinary memory. "
        "GB/s of inputs, and the best of them as a share of what the link carries. *torch's own operations* are what "
        "there is without the package `cuda-core`.",
        of_the_link(results),
        "Whole merges, sources in the page cache; engine seconds, medians (least–most). *GB/s* is what the fastest "
        "reads of its sources, every pass counted, and with it what of the link that is; *floor's* is the same of the "
        "floor, which has no GPU and computes nothing: what files can be read and written at bounds it.",
        whole(results),
        f"RegMean of a {MATRIX} × {MATRIX} matrix of two sources, copies included: {number(solved['cpu'])} s on the "
        f"CPU, {number(solved[DEVICE])} s on the GPU, relative difference {solved['relative']:.1e}.",
        "The examples made on the CPU and on the GPU. Coordinate methods may differ by nothing; "
        f"{', '.join(f'`{name}`' for name in MEASURED)} by {CLOSE:g} of their norm, since they rest on what networks "
        "give in float32; there a number that is all but zero may be many steps apart.",
        alike(results),
    ]
    return "\n\n".join(said)
