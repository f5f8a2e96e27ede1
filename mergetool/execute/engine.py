"""The conveyor: jobs worked through by all workers into a staging folder, each journalled when it is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from mergetool.anatomy import Turning
from mergetool.errors import NonFinite, Problem, RunError, SourceChanged
from mergetool.execute.batch import batches, large, spans
from mergetool.execute.buffers import Bytes, aligned
from mergetool.execute.intact import spoilt
from mergetool.execute.job import NOTHING, Facts, Outcome, work
from mergetool.execute.known import Known
from mergetool.execute.locks import FACTS, LAYOUT
from mergetool.execute.measure import FOLDER, measure_model
from mergetool.execute.outlet import FileSink, Joined, Outlet, Sink
from mergetool.execute.progress import Progress
from mergetool.execute.sources import open_sources
from mergetool.execute.staging import Staging
from mergetool.execute.tiles import Sources, Stopped
from mergetool.kernels.backend import Backend
from mergetool.methods import METHODS
from mergetool.plan import Job, Plan
from mergetool.plan.digest import unchanged
from mergetool.plan.memory import machine_memory
from mergetool.storage.writer import Writer

FLUSH_BYTES = 256 << 20
"""The disk is asked to take what lies in the page cache whenever there is so much of it, while the workers go on."""


Made = tuple[list[Outcome], Callable[[], None]]
"""What came of a batch's jobs, and what waits until all of it is written."""


class _Flusher(ThreadPoolExecutor):
    """Has the disk take what was written while the workers go on, so that the last sync has little to wait for."""

    def __init__(self) -> None:
        super().__init__(1, "mergetool-flush")
        self._going: Future[None] | None = None

    def wrote(self, writer: Writer) -> None:
        """Start a flush of a file when there is enough to flush and none is going on.

        Raises:
            RunError: an earlier flush failed.
        """
        if writer.cached >= FLUSH_BYTES and (self._going is None or self._going.done()):
            self.wait()
            self._going = self.submit(writer.sync)

    def wait(self) -> None:
        """Wait for the flush that goes on.

        Raises:
            RunError: it failed.
        """
        if self._going is not None:
            self._going.result()


@dataclass
class Engine:
    """Works through jobs into a staging folder."""

    plan: Plan
    """With the jobs to do, and others that are measured with them."""
    jobs: Sequence[Job]
    stage: Staging
    backend: Backend
    progress: Progress
    allow_nonfinite: bool
    known: Known = NOTHING
    """What was measured or trained ahead of the jobs."""
    turnings: Mapping[int, Turning] = field(default_factory=dict)
    """The sources that are read in another order of their units."""
    allocate: Callable[[int], Bytes] = aligned
    """Makes the buffers; see :func:`mergetool.execute.devices.memory_for`."""
    resumed: int = 0
    bytes_read: int = 0

    def run(self) -> dict[str, Outcome]:
        """Measure and merge; what every tensor came to, by name."""
        unchanged(self.plan)
        opened = open_sources(self.plan, self.turnings, allocate=self.allocate)
        with opened as sources, contextlib.ExitStack() as stack:
            writers = self._writers(stack)
            outlet = stack.enter_context(
                Outlet(self._largest_piece(), self.plan.memory.workers, sources.stop, self.allocate)
            )
            pool = stack.enter_context(ThreadPoolExecutor(self.plan.memory.workers, "mergetool"))
            stack.callback(sources.stop.set)
            left = self._left(pool)
            outcomes = dict(self.stage.done)
            self.resumed = len(outcomes)
            facts = self._facts(sources, pool, left)
            self.progress.start(sum(job.bytes_read + job.bytes_written for job in left), "merge")
            flusher = stack.enter_context(_Flusher())
            try:
                for job, outcome in self._merge(left, sources, facts, writers, pool, outlet):
                    outcomes[job.name] = outcome
                    self._trusting(partial(flusher.wrote, writers[job.name][0]))
                    self._let_go(job, sources)
                self._trusting(lambda: self._on_disk(flusher, sources, writers))
            except BaseException:
                with contextlib.suppress(RunError):  # the first error is the news, but the journal must know of both
                    self._trusting(flusher.wait)
                raise
            finally:
                sources.stop.set()
                self.bytes_read = sources.bytes_read
                self.progress.close()
        return outcomes

    def _trusting(self, check: Callable[[], None]) -> None:
        """Make a check; if it fails what was read was not the source, or what was written is not on the disk."""
        try:
            check()
        except RunError:
            self.stage.distrust()
            raise

    def _on_disk(self, flusher: _Flusher, sources: Sources, writers: Mapping[str, tuple[Writer, int]]) -> None:
        """Wait for the disk, and see that the sources are still what was read."""
        flusher.wait()
        for writer in {id(writer): writer for writer, _ in writers.values()}.values():
            writer.sync()
        for reader in sources.readers.values():
            if reader.changed():
                raise SourceChanged("the file changed while it was merged", str(reader.path), "run again")

    def _writers(self, stack: contextlib.ExitStack) -> dict[str, tuple[Writer, int]]:
        """For each tensor the open file it goes to and its offset there."""
        places = {}
        names = {job.name for job in self.jobs}
        with self.stage.alone(LAYOUT):
            for shard in self.plan.shards:
                if names.isdisjoint(shard.header.entries):
                    continue
                writer = stack.enter_context(Writer(self.stage.path / shard.file, shard, resume=True))
                if writer.fresh:
                    self.stage.forget(set(shard.header.entries))
                places.update({name: (writer, entry.start) for name, entry in shard.header.entries.items()})
        return places

    def _left(self, pool: ThreadPoolExecutor) -> list[Job]:
        """The jobs to do: those not journalled, or whose bytes are not what the journal says."""
        self.stage.forget(spoilt(self.plan.shards, self.stage.path, self.stage.done, pool))
        if not self.allow_nonfinite:  # an earlier run may have been told to
            self.stage.forget({name for name, outcome in self.stage.done.items() if outcome.bad})
        return [job for job in self.jobs if job.name not in self.stage.done]

    def _facts(self, sources: Sources, pool: ThreadPoolExecutor, left: Sequence[Job]) -> Facts:
        if not any(job.facts for job in left):
            return {}
        with self.stage.alone(FACTS):  # the first part measures, the others wait for what it finds
            return measure_model(self.plan, sources, self.backend, pool, self.stage.path / FOLDER, self.progress)

    def _merge(
        self,
        jobs: Sequence[Job],
        sources: Sources,
        facts: Facts,
        writers: Mapping[str, tuple[Writer, int]],
        pool: ThreadPoolExecutor,
        outlet: Outlet,
    ) -> Iterator[tuple[Job, Outcome]]:
        """Give jobs to the workers in order, a few ahead, small ones by the batch; all share a wide one."""
        pending: dict[Future[Made], list[Job]] = {}
        ahead = 2 * self.plan.memory.workers

        def collect(until: int) -> Iterator[tuple[Job, Outcome]]:
            while len(pending) > until:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield from self._settle(pending.pop(future), *future.result())

        def one(job: Job, sources: Sources, sink: Sink, pool: Executor | None = None) -> Outcome:
            return work(self.plan, job, sources, self.backend, facts, sink, pool, self.known)

        def alone(job: Job, pool: Executor | None = None) -> Made:
            sink = FileSink(outlet, *writers[job.name], self._advance(job))
            return [one(job, sources, sink, pool)], sink.wait

        def together(batch: Sequence[Job]) -> Made:
            joined, read = Joined(outlet), sources.ahead(batch)
            outcomes = [one(job, read, joined.sink(*writers[job.name], job.dtype.storage.itemsize)) for job in batch]
            joined.flush()
            self.progress.advance(sum(job.bytes_read + job.bytes_written for job in batch))
            return outcomes, joined.wait

        try:
            for batch in batches(jobs, self._alone):
                if self._alone(batch[0]):
                    yield from collect(0)
                    yield from self._settle(batch, *alone(batch[0], pool))
                else:
                    self._read_ahead(batch, sources)
                    future = pool.submit(together, batch) if len(batch) > 1 else pool.submit(alone, batch[0])
                    pending[future] = batch
                    yield from collect(ahead)
            yield from collect(0)
        except BaseException as error:
            sources.stop.set()
            self._first_cause(pending, error)
            raise

    def _first_cause(self, pending: Iterable[Future[Any]], error: BaseException) -> None:
        """A job that gave up because another failed is not the news; raise that other's error instead."""
        for future in pending:
            future.cancel()
        if isinstance(error, Stopped):
            for future in pending:
                cause = None if future.cancelled() else future.exception()
                if cause is not None and not isinstance(cause, Stopped):
                    raise cause

    def _read_ahead(self, jobs: Sequence[Job], sources: Sources) -> None:
        """Have the system fetch what the next jobs read; not where free pages are the shortest of all."""
        for span in () if self._overflows else spans(jobs):
            sources.readers[span.source, span.file].advise(span.start, span.nbytes)

    @cached_property
    def _overflows(self) -> bool:
        """Whether the sources are more than the page cache is likely to keep."""
        return sum(job.bytes_read for job in self.plan.jobs) > machine_memory() // 2

    def _let_go(self, job: Job, sources: Sources) -> None:
        """Give back the pages of large tensors that nobody will look at again: the system finds others only slowly."""
        for read in job.reads if self._overflows else ():
            if large(read):
                sources.readers[read.source, read.tensor.file].forget(read.tensor.start, read.tensor.nbytes)

    def _alone(self, job: Job) -> bool:
        """Whether nothing else is worked on meanwhile: all share a wide job, and a whole matrix takes much memory."""
        return self.plan.memory.wide(job) or bool(job.method and METHODS[job.method].reach == "matrix")

    def _advance(self, job: Job) -> Callable[[int], None]:
        """Tells the progress of the bytes written, and of those read for them."""
        share = 1 + job.bytes_read / max(job.bytes_written, 1)
        return lambda nbytes: self.progress.advance(round(nbytes * share))

    def _largest_piece(self) -> int:
        """Bytes of the largest tile of a result."""
        return self.plan.memory.tile * max((-(-job.dtype.bits // 8) for job in self.jobs), default=1)

    def _settle(
        self, batch: Sequence[Job], outcomes: Sequence[Outcome], written: Callable[[], None]
    ) -> Iterator[tuple[Job, Outcome]]:
        """Journal jobs that are done and written, and stop at the first whose numbers are not finite."""
        written()
        done = list(zip(batch, outcomes, strict=True))
        bad = [] if self.allow_nonfinite else [(job, outcome) for job, outcome in done if outcome.bad]
        self.stage.note({job.name: outcome for job, outcome in done if self.allow_nonfinite or not outcome.bad})
        if bad:
            raise self._nonfinite(*bad[0])
        yield from done

    def _nonfinite(self, job: Job, outcome: Outcome) -> NonFinite:
        found = ", ".join(f"{count} in {where}" for where, count in outcome.bad.items())
        return NonFinite(
            Problem(
                f"`{job.name}` has values that are NaN or infinite: {found}",
                fix="mend the source, `keep` the tensor of another one by a rule, or give `--allow-nonfinite`; "
                f"what is done so far is kept in {self.stage.path.name}",
            )
        )
