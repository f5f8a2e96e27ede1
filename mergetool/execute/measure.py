"""The stage ahead of the merge: what a method must know about whole models, made into a folder of facts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from mergetool.errors import CheckpointError
from mergetool.execute.job import Facts, deltas
from mergetool.execute.progress import Progress, Quiet
from mergetool.execute.tiles import Sources
from mergetool.facts.magnitude import cuts
from mergetool.kernels.backend import Array, Backend
from mergetool.methods import METHODS
from mergetool.methods.apply import Deltas
from mergetool.methods.declare import Cut
from mergetool.plan import Job, Plan
from mergetool.storage.dtypes import dtype
from mergetool.storage.header import lay_out, read_header
from mergetool.storage.reader import Reader
from mergetool.storage.writer import atomic_write

R = TypeVar("R")
FOLDER = "facts"


def measure_model(
    plan: Plan,
    sources: Sources,
    backend: Backend,
    pool: Executor,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Facts:
    """Make the facts that the plan's jobs need, or read those that an earlier run has made.

    Args:
        plan: the plan.
        sources: the open files.
        backend: where the kernels run.
        pool: the workers.
        folder: where facts are kept: one float64 tensor for each, one number for each source.
        progress: told of what a pass has gone over.
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
            known = _cuts(_Model(plan, jobs, sources, backend, pool, progress or Quiet()), measure)
            if path is not None:
                _write(path, measure, known)
        facts[method, measure] = known
    return facts


@dataclass(frozen=True)
class _Model:
    """The magnitudes of the deltas of many jobs; a :class:`mergetool.facts.magnitude.Look`."""

    plan: Plan
    jobs: Sequence[Job]
    sources: Sources
    backend: Backend
    pool: Executor
    progress: Progress

    def sample(self, share: float) -> list[Array]:
        """About a share of each source's magnitudes."""
        return self._joined(lambda deltas: deltas.sample(share))

    def above(self, thresholds: Array) -> Array:
        """How many magnitudes of each source reach each threshold."""
        return sum(self._each(lambda deltas: deltas.above(thresholds)), np.zeros(thresholds.shape, np.int64))

    def between(self, low: Array, high: Array) -> list[Array]:
        """Each source's magnitudes in a range."""
        return self._joined(lambda deltas: deltas.between(low, high))

    def _joined(self, look: Callable[[Deltas], list[Array]]) -> list[Array]:
        return [np.concatenate(rows) for rows in zip(*self._each(look), strict=True)]

    def _each(self, look: Callable[[Deltas], R]) -> Iterator[R]:
        """Narrow jobs side by side, one to a worker; then each wide one, shared by all."""

        def at(job: Job, pool: Executor | None) -> R:
            found = look(deltas(self.plan, job, self.sources, self.backend, pool))
            self.progress.advance(job.bytes_read)
            return found

        self.progress.start(sum(job.bytes_read for job in self.jobs), "measure")
        try:
            yield from self.pool.map(lambda job: at(job, None), [j for j in self.jobs if not self.plan.memory.wide(j)])
            for job in self.jobs:
                if self.plan.memory.wide(job):
                    yield at(job, self.pool)
        finally:
            self.progress.close()


def _cuts(model: _Model, measure: str) -> tuple[float, ...]:
    first = model.jobs[0]
    declared = METHODS[first.method].measures[measure]
    assert isinstance(declared, Cut)
    return cuts(first.parameters[declared.density], sum(job.size for job in model.jobs), model)


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
