"""One job worked through: measure, combine, digest, write; what is not finite is counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import numpy as np

from mergetool.execute.buffers import typed
from mergetool.execute.known import Known, Nothing, extra_tiles
from mergetool.execute.matrix import solve
from mergetool.execute.outlet import Sink
from mergetool.execute.tiles import Inputs, Sources, tiles
from mergetool.facts.correction import Edit
from mergetool.kernels.backend import Array, Backend, Layout
from mergetool.kernels.rounding import OVERFLOW, narrow, widen
from mergetool.methods import METHODS
from mergetool.methods.apply import Bound, Deltas, bind, combiner, looks, measure
from mergetool.plan import Job, Plan
from mergetool.storage.digest import BLOCK_BYTES, block_digest, combine

Facts = Mapping[tuple[str, str], tuple[float, ...]]
"""Measures of the whole model, by method and measure."""


NOTHING = Nothing()


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    digest: str
    bad: Mapping[str, int] = field(default_factory=dict)
    """Coordinates that are not finite: by source, and ``result`` for those of the result alone."""
    unequal: tuple[str, ...] = ()
    """For a copy: the sources whose tensor differs."""


def bound(plan: Plan, job: Job) -> Bound:
    """A job's method with its parameters and random keys."""
    method = METHODS[job.method]
    labels = [plan.sources[read.source].label for read in job.reads[method.base == "required" :]]
    return bind(method, job.parameters, plan.recipe.seed, labels, job.name)


def layout(job: Job) -> Layout:
    """The dtypes of a job's tiles."""
    method = METHODS[job.method]
    dtypes = tuple(read.tensor.dtype.name for read in job.reads)
    return Layout(method.base == "required", dtypes, job.dtype.name, tuple(method.facts))


def deltas(plan: Plan, job: Job, sources: Sources, backend: Backend, pool: Executor | None) -> Deltas:
    """The magnitudes of a job's deltas, for a measure of the whole model."""
    return Deltas(tiles(plan, job, job.reads, sources, False, pool).visit, layout(job), backend)


def work(
    plan: Plan,
    job: Job,
    sources: Sources,
    backend: Backend,
    facts: Facts,
    sink: Sink,
    pool: Executor | None = None,
    known: Known = NOTHING,
) -> Outcome:
    """Make one output tensor.

    Args:
        plan: the plan.
        job: one of its jobs.
        sources: the open files.
        backend: where the kernels run.
        facts: the measures of the whole model that the job needs.
        sink: takes the result.
        pool: the workers that share a wide job's tiles.
        known: what was measured on data or trained ahead of the merge.
    """
    edit = known.edit(job)
    if job.added:
        return _add(plan, job, edit, sink)
    if not job.method:
        return _copy(plan, job, sources, sink, pool)
    fixed = bound(plan, job)
    if METHODS[job.method].reach == "matrix":
        seen = _Seen(sink)
        bad = solve(plan, job, fixed, sources, known, seen, backend.matrices)
        return Outcome(combine(seen.digests), bad)
    over = tiles(plan, job, job.reads, sources, looks(fixed, job.facts), pool)
    ahead = {name: facts[job.method, name] for name in job.facts}
    shape = layout(job)
    measured = measure(fixed, shape, job.size, over.visit, backend, ahead)
    kernel = combiner(fixed, shape if edit is None else replace(shape, output="F64"), measured, backend)

    def make(start: int, inputs: Inputs) -> tuple[list[bytes], Counter[str]]:
        width = job.dtype.storage.itemsize
        raw = sink.take(start * width, inputs[0].size * width)
        extras = extra_tiles(known, job, shape.sources, start, start + inputs[0].size)
        out = typed(raw, job.dtype.storage)
        tile = out if edit is None else np.empty(out.size)
        count = kernel(start, (*inputs, *extras), tile)
        if edit is not None:
            edit.tile(tile, job.shape, start)
            count = count or int(np.count_nonzero(~(np.abs(tile) < OVERFLOW[job.dtype.name])))
            out[...] = narrow(tile, job.dtype.name)
        bad = _blame(plan, job, inputs, count)
        found = digests(raw)
        sink.put(start * width, raw)
        return found, bad

    pieces = sorted(over.visit(make), key=lambda piece: piece[0])
    total: Counter[str] = sum((bad for _, (_, bad) in pieces), Counter())
    return Outcome(combine([digest for _, (found, _) in pieces for digest in found]), dict(total))


def _add(plan: Plan, job: Job, edit: Edit | None, sink: Sink) -> Outcome:
    """Make a tensor that no source has: zeros, and what a correction makes of them."""
    found, bad = [], 0
    width, tile = job.dtype.storage.itemsize, plan.memory.tile
    for start in range(0, job.size, tile):
        values = np.zeros(min(tile, job.size - start))
        if edit is not None:
            edit.tile(values, job.shape, start)
        bad += int(np.count_nonzero(~(np.abs(values) < OVERFLOW[job.dtype.name])))
        raw = sink.take(start * width, values.size * width)
        typed(raw, job.dtype.storage)[...] = narrow(values, job.dtype.name)
        found += digests(raw)
        sink.put(start * width, raw)
    return Outcome(combine(found), {"result": bad} if bad else {})


class _Seen:
    """A sink that digests what goes by, in order."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.digests: list[bytes] = []

    def take(self, start: int, nbytes: int) -> Array:
        """A buffer of the sink behind."""
        return self._sink.take(start, nbytes)

    def put(self, start: int, raw: Array) -> None:
        """Digest it and pass it on."""
        self.digests += digests(raw)
        self._sink.put(start, raw)


def digests(raw: Array) -> list[bytes]:
    """The digests of a tile's blocks."""
    return [block_digest(raw[i : i + BLOCK_BYTES]) for i in range(0, len(raw), BLOCK_BYTES)]


def _blame(plan: Plan, job: Job, inputs: Inputs, count: int) -> Counter[str]:
    """Say by source what ``count`` coordinates that are not finite come from; else it is the result's own."""
    bad: Counter[str] = Counter()
    if count:
        for read, raw in zip(job.reads, inputs, strict=True):
            wide = widen(raw, read.tensor.dtype.name)
            bad[plan.sources[read.source].label] = int(np.count_nonzero(~np.isfinite(wide)))
        bad = +bad or Counter(result=count)
    return bad


def _copy(plan: Plan, job: Job, sources: Sources, sink: Sink, pool: Executor | None) -> Outcome:
    """Copy the first read's bytes, and see whether the others hold the same."""
    kind = job.shape, job.dtype
    alike = [read for read in job.compare if (read.tensor.shape, read.tensor.dtype) == kind]
    over = tiles(plan, job, alike, sources, False, pool)

    def one(start: int, others: Inputs) -> tuple[list[bytes], list[bool]]:
        stop = min(start + over.tile, job.size)
        first, last = start * job.dtype.bits // 8, -(-stop * job.dtype.bits // 8)
        raw = sink.take(first, last - first)
        sources.load(job.reads, start, stop, [raw])
        found = digests(raw), [not np.array_equal(raw, other.view(np.uint8)) for other in others]
        sink.put(first, raw)
        return found

    pieces = sorted(over.visit(one), key=lambda piece: piece[0])
    differ = [read for i, read in enumerate(alike) if any(different[i] for _, (_, different) in pieces)]
    unequal = tuple(plan.sources[r.source].label for r in job.compare if r not in alike or r in differ)
    return Outcome(combine([digest for _, (found, _) in pieces for digest in found]), {}, unequal)
