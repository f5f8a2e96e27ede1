"""How a run is cut to its memory budget: workers, tiles, and how much of a tensor is kept while it is worked on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import gcd

from mergetool.errors import PlanError
from mergetool.methods import METHODS
from mergetool.plan.passes import inputs
from mergetool.plan.work import Job, Memory

INTERPRETER = 200 << 20
"""Anonymous memory of the process before any tensor: the interpreter, NumPy, Numba and the compiled kernels."""
LARGEST_BUDGET = 640 << 20
"""The default budget is an eighth of the machine, but no more than this: more buys no speed."""
SMALLEST_TILE = 1 << 18
"""Coordinates; every tile starts at a multiple of this, which digests and sums by blocks rely on."""
LARGEST_TILE = 1 << 20
PREFERRED_RESIDENT = 24 << 20
"""More is no faster: it falls out of the processor's caches, and the system has to find and clear it first."""
WRITERS = 2
"""Threads that wait for the disk while the workers go on; two keep it busy. Each holds a tile of a result."""
BATCH_BYTES = 4 << 20
"""Small tensors go to a worker together until they have so many bytes, which it reads by as few calls as it can."""
COUNTS = 3 << 20
"""Bytes of the magnitudes of one source that are looked at together: those of a tile, the sample, those gathered."""


CORRECTED = 48
"""Bytes of a coordinate that is corrected: float64 of the result, of a factor and of what rounding takes."""


def default_budget() -> int:
    """A small fraction of the machine's memory, never the model's size; bytes."""
    return max(INTERPRETER + (128 << 20), min(LARGEST_BUDGET, machine_memory() // 8))


def machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_workers() -> int:
    """One for each core this process may use, and two where there is one, to overlap waiting for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores, 2)


def fit(jobs: Sequence[Job], budget: int | None, workers: int | None) -> Memory:
    """Choose workers and tiles for a budget.

    Args:
        jobs: what is to be done.
        budget: bytes; None for :func:`default_budget`.
        workers: how many threads work; None for as many as the cores and the budget allow.

    Raises:
        PlanError: the budget is too small even for one worker with the smallest tiles.
    """
    matrix = max((_bytes_of_matrices(job) for job in jobs), default=0)
    budget = max(default_budget(), INTERPRETER + 2 * matrix) if budget is None else budget
    if matrix and budget < INTERPRETER + matrix:
        raise PlanError(
            f"a memory budget of {budget >> 20} MiB is too small: the largest matrix takes "
            f"{-(-(INTERPRETER + matrix) >> 20)} MiB to solve",
            where="--memory",
            fix=f"give `--memory {-(-(INTERPRETER + matrix) >> 20)}MiB` or more, or `keep` that tensor by a rule",
        )
    widest = max((_bytes_per_coordinate(job) for job in jobs), default=1)
    results = WRITERS * max((-(-job.dtype.bits // 8) for job in jobs), default=1)  # being written, by coordinate
    counts = max((COUNTS * len(job.reads) for job in jobs if job.method), default=0)
    fixed = counts + _bytes_of_a_batch(jobs)
    smallest = INTERPRETER + SMALLEST_TILE * (widest + results) + fixed
    if budget < smallest:
        raise PlanError(
            f"a memory budget of {budget >> 20} MiB is too small: this merge takes at least {-(-smallest >> 20)} MiB",
            where="--memory",
            fix=f"give `--memory {-(-smallest >> 20)}MiB` or more",
        )
    room = budget - INTERPRETER
    threads = workers or default_workers()

    def needed(tile: int) -> int:
        return threads * (tile * widest + fixed) + tile * results

    while workers is None and threads > 1 and room < needed(LARGEST_TILE):
        threads -= 1
    tile = LARGEST_TILE
    while tile > SMALLEST_TILE and room < needed(tile):
        tile -= SMALLEST_TILE
    if room < needed(tile):
        wanted = -(-(INTERPRETER + needed(tile)) >> 20)
        raise PlanError(
            f"a memory budget of {budget >> 20} MiB is too small for {threads} workers: they take {wanted} MiB",
            where="--memory",
            fix=f"give `--memory {wanted}MiB` or more, or fewer `--workers`",
        )
    share = (room - tile * results) // threads - fixed
    largest = max((job.bytes_read for job in jobs), default=0)
    resident = max(0, min(share - tile * widest, PREFERRED_RESIDENT, largest))
    peak = INTERPRETER + needed(tile) + threads * resident
    return Memory(budget, min(max(peak, INTERPRETER + matrix), budget), threads, tile, resident)


def _bytes_per_coordinate(job: Job) -> int:
    """The bytes of one coordinate of a tile: every input and the result.

    Where elements share bytes a tile is more of them: the least number that fills whole bytes, in place of each.
    """
    dtypes = [*(read.tensor.dtype for read in (*job.reads, *job.compare)), job.dtype]
    extras = 4 * len(job.reads) * len(METHODS[job.method].facts) if job.method else 0  # float32, one a source
    extras += CORRECTED if job.corrected is not None else 0
    return sum(dtype.bits // gcd(8, dtype.bits) for dtype in dtypes) + extras


def _bytes_of_a_batch(jobs: Sequence[Job]) -> int:
    """What a worker reads together at most; nothing where no two jobs are small."""
    small = [nbytes for job in jobs if 0 < (nbytes := job.bytes_read) <= BATCH_BYTES]
    return min(BATCH_BYTES, sum(small)) if len(small) > 1 else 0


def _bytes_of_matrices(job: Job) -> int:
    """What solving a job's matrix holds at once: three of its inputs' size squared, four of its own, in float64."""
    if not job.method or METHODS[job.method].reach != "matrix":
        return 0
    stack = job.shape[0] if len(job.shape) > 2 else 1
    return 8 * (3 * stack * inputs(job) ** 2 + 4 * job.size) + job.bytes_read
