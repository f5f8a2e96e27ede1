"""A plan's result as weights in memory, one tensor at a time: so that a merged model can be run before it is written.

Every tensor comes out of the same work as in a run and is rounded to the dtype that it will be stored in: what is
measured of such a model is what the written one does, to the last bit of every weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergetool.execute.devices import backend_for
from mergetool.execute.job import Facts, work
from mergetool.execute.measure import measure_model
from mergetool.execute.outlet import Memory
from mergetool.execute.prepared import Prepared
from mergetool.execute.sources import fetched, open_sources
from mergetool.execute.tiles import Sources
from mergetool.kernels.backend import Array, Backend
from mergetool.plan import Job, Plan

if TYPE_CHECKING:
    import torch


@dataclass
class Merged:
    """The tensors of a plan's result, made when they are asked for; a
    :class:`~mergetool.execute.forward.weights.Weights`.

    Attributes:
        plan: the plan, its files on this disk.
        known: what was made ahead of its jobs.
        sources: its open files.
        backend: where the kernels run.
        pool: the workers that share a wide tensor's tiles.
    """

    plan: Plan
    known: Prepared
    sources: Sources
    backend: Backend
    pool: Executor
    _facts: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict, repr=False)
    _jobs: dict[str, Job] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._jobs = {job.name: job for job in self.plan.jobs}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor by its name on disk."""
        return {name: job.shape for name, job in self._jobs.items()}

    def get(self, name: str) -> torch.Tensor:
        """A tensor in its shape, as it will be stored: float32 if it holds floats, else as it is.

        Raises:
            CheckpointError: its type cannot be computed with, or a source's file ends early.
            RunError: the disk fails.
        """
        from mergetool.execute.forward.weights import tensor_of

        job = self._jobs[name]
        return tensor_of(self.raw(job), job.dtype, job.shape, name)

    def raw(self, job: Job) -> Array:
        """A tensor as raw storage, flat: bfloat16 and float16 as uint16.

        Raises:
            CheckpointError: a source's file ends early.
            RunError: the disk fails.
        """
        result = Memory(job.bytes_written)
        pool = self.pool if self.plan.memory.wide(job) else None
        work(self.plan, job, self.sources, self.backend, self._measured(job), result, pool, self.known)
        return result.raw.view(job.dtype.storage)

    def _measured(self, job: Job) -> Facts:
        """The measures of the whole model that a job needs; each is made once."""
        if missing := [name for name in job.facts if (job.method, name) not in self._facts]:
            together = tuple(each for each in self.plan.jobs if set(each.facts) & set(missing))
            self._facts |= measure_model(replace(self.plan, jobs=together), self.sources, self.backend, self.pool)
        return self._facts


@contextlib.contextmanager
def merged_weights(plan: Plan, known: Prepared | None = None, device: str = "cpu") -> Iterator[Merged]:
    """Open a plan's sources for a while, to make tensors of its result in memory.

    >>> with merged_weights(plan, prepare(plan)) as weights:
    ...     model = open_model(plan.sources[plan.lender].checkpoint.config, weights, "the merged model")

    Args:
        plan: the plan; its weight files are fetched first.
        known: what :func:`~mergetool.execute.prepare.prepare` has made; by default nothing is known.
        device: where the kernels run.

    Raises:
        CheckpointError: a file cannot be fetched or opened.
        SourceChanged: a file is not what it was when the plan was made.
        PlanError: there is no such device.
    """
    known = known or Prepared(plan)
    backend = backend_for(device)
    ready = fetched(plan, known.turnings)
    with open_sources(ready, known.turnings) as sources, ThreadPoolExecutor(plan.memory.workers) as pool:
        yield Merged(ready, known, sources, backend, pool)
