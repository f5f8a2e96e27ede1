"""The stage ahead of the merge: what a method must know about whole models, made into a folder of facts."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from mergetool.errors import CheckpointError
from mergetool.execute.job import Facts, count, is_wide
from mergetool.execute.tiles import Sources
from mergetool.facts.magnitude import Counts, cuts
from mergetool.kernels.backend import Array, Backend
from mergetool.methods import METHODS
from mergetool.methods.declare import Cut
from mergetool.plan import Job, Plan
from mergetool.storage.dtypes import dtype
from mergetool.storage.header import lay_out, read_header
from mergetool.storage.reader import Reader
from mergetool.storage.writer import atomic_write

FOLDER = "facts"


def measure_model(plan: Plan, sources: Sources, backend: Backend, pool: Executor, folder: Path | None = None) -> Facts:
    """Make the facts that the plan's jobs need, or read those that an earlier run has made.

    Args:
        plan: the plan.
        sources: the open files.
        backend: where the kernels run.
        pool: the workers.
        folder: where facts are kept: one float64 tensor for each, one number for each source.
    """
    wanted: dict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in plan.jobs:
        for measure in job.facts:
            wanted[job.method, measure].append(job)
    facts = {}
    for (method, measure), jobs in wanted.items():
        path = folder / f"{method}.{measure}.safetensors" if folder is not None else None
        known = _read(path, measure) if path is not None else None
        if known is None:
            known = _cuts(plan, jobs, measure, sources, backend, pool)
            if path is not None:
                _write(path, measure, known)
        facts[method, measure] = known
    return facts


def _cuts(
    plan: Plan, jobs: Sequence[Job], measure: str, sources: Sources, backend: Backend, pool: Executor
) -> tuple[float, ...]:
    declared = METHODS[jobs[0].method].measures[measure]
    assert isinstance(declared, Cut)

    def everything(within: bool, prefix: Array) -> Counts:
        total: Counts = np.zeros((len(prefix), 1 << 16), np.int64)
        guard = threading.Lock()

        def add(job: Job) -> None:  # here and not by the caller: counts that wait to be added up take memory
            counted = count(plan, job, sources, backend, within, prefix, None)
            with guard:
                np.add(total, counted, out=total)

        for _ in pool.map(add, [job for job in jobs if not is_wide(plan, job)]):
            pass
        for job in jobs:
            if is_wide(plan, job):
                total += count(plan, job, sources, backend, within, prefix, pool)
        return total

    return cuts(jobs[0].parameters[declared.density], sum(job.size for job in jobs), everything)


def _write(path: Path, name: str, values: tuple[float, ...]) -> None:
    path.parent.mkdir(exist_ok=True)
    raw = np.array(values, np.float64).tobytes()
    _, preamble = lay_out([(name, dtype("F64"), (len(values),))], {"digest": hashlib.sha256(raw).hexdigest()})
    atomic_write(path, preamble + raw)


def _read(path: Path, name: str) -> tuple[float, ...] | None:
    """The facts of an earlier run; None where there are none or where they are not as they were written."""
    if not path.exists():
        return None
    try:
        header = read_header(path)
        with Reader(path, header) as reader:
            values = reader.read(header.entries[name])
    except (CheckpointError, KeyError):
        return None
    if header.metadata.get("digest") != hashlib.sha256(values.tobytes()).hexdigest():
        return None
    return tuple(float(x) for x in values)
