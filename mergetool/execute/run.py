"""Run a plan: fetch, measure, merge job by job with all workers, then complete the folder and give it its name."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.checkpoint.checkpoint import fetch
from mergetool.errors import MergetoolError, NonFinite, OutputRefused, PlanError, Problem, RunError, SourceChanged
from mergetool.execute.buffers import Arena
from mergetool.execute.job import Facts, Outcome, is_wide, work
from mergetool.execute.measure import FOLDER, measure_model
from mergetool.execute.progress import Progress, Quiet
from mergetool.execute.staging import Staging, read_provenance, refuse, staging
from mergetool.execute.tiles import Sources, Stopped
from mergetool.kernels.backend import Array, Backend, compiled
from mergetool.plan import Job, Plan, Report
from mergetool.plan.build import digest
from mergetool.publish import publish
from mergetool.storage.digest import tensor_digest
from mergetool.storage.reader import Reader
from mergetool.storage.writer import Writer


def run(
    plan: Plan,
    output: Path | str | None = None,
    *,
    device: str = "cpu",
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Execute a plan and write the merged model folder.

    The output appears under its name only when it is complete. A run that was interrupted continues where it
    stopped when it is called again with the same plan, and gives the same bytes.

    >>> report = run(plan, "merged")
    >>> report.output
    PosixPath('merged')

    Args:
        plan: what :func:`mergetool.build` returned.
        output: the folder to make; by default the plan's.
        device: ``cpu``, or ``cuda``, ``cuda:1``, … through torch.
        force: replace an output folder that is not ours or of another recipe.
        allow_nonfinite: write NaNs and infinities instead of stopping at the first tensor that has any.
        progress: told of every byte; by default nobody is.

    Raises:
        OutputRefused: the output exists, is locked by another run, or cannot be written.
        NonFinite: a source or a result has a NaN or an infinity.
        SourceChanged: a source's file is not what was planned with.
        CheckpointError: a source's file ends early.
        RunError: the disk is full or fails.
        PlanError: there is no such device.
    """
    began = time.monotonic()
    progress = progress or Quiet()
    target = Path(output) if output is not None else plan.output
    if target is None:
        raise OutputRefused("there is no output", fix="set `output` in the recipe or name a folder")
    if target.name in ("", ".."):  # the folder needs a name, for another to stand beside it
        target = target.resolve()
    backend = backend_for(device)
    refuse(plan, target, force)
    if (ours := read_provenance(target)) is not None and not force and _complete(plan, target, ours):
        return Report(plan, target, ours["tensors"], tuple(ours["notes"]), {}, time.monotonic() - began, 0, True)
    with staging(plan, target) as stage:
        _room(plan, target, stage)
        engine = _Engine(_fetched(plan), stage, backend, progress, allow_nonfinite)
        outcomes = engine.run()
        notes = (*plan.notes, *_notes(outcomes))
        digests = {name: outcomes[name].digest for name in (job.name for job in plan.jobs)}
        publish(engine.plan, stage.path, digests, notes)
        shutil.rmtree(stage.path / FOLDER, ignore_errors=True)
        stage.finish(target)
    bad = {name: sum(outcome.bad.values()) for name, outcome in outcomes.items() if outcome.bad}
    return Report(plan, target, digests, notes, bad, time.monotonic() - began, engine.resumed)


def compute(plan: Plan, job: Job, device: str = "cpu") -> Array:
    """Make one output tensor in memory.

    Returns:
        Its raw storage, flat: bfloat16 and float16 as uint16.

    Raises:
        CheckpointError: a source's file ends early.
        PlanError: there is no such device.
    """
    raw = np.empty(job.bytes_written, np.uint8)

    def keep(piece: Array, offset: int) -> None:
        raw[offset : offset + piece.nbytes] = piece.view(np.uint8)

    backend = backend_for(device)
    with open_sources(_fetched(plan)) as sources, ThreadPoolExecutor(plan.memory.workers) as pool:
        needed = replace(plan, jobs=tuple(j for j in plan.jobs if set(j.facts) & set(job.facts)))
        facts = measure_model(needed, sources, backend, pool)
        work(plan, job, sources, backend, facts, keep)
    return raw.view(job.dtype.storage)


def backend_for(device: str) -> Backend:
    """Where a device's kernels run: ``cpu`` is compiled, ``torch:cpu`` the GPU's code on the CPU.

    Raises:
        PlanError: there is no such device.
    """
    if device == "cpu":
        return compiled()
    name = device.removeprefix("torch:")
    if name.split(":")[0] not in ("cuda", "cpu"):
        raise PlanError(f"there is no device `{device}`", "--device", "use cpu, cuda or cuda:<number>")
    import torch

    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        number = name.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= count:
            have = f"there are {count} GPUs" if count else "torch finds no GPU here"
            raise PlanError(f"cannot use `{device}`: {have}", "--device", "use `--device cpu`")
    from mergetool.kernels.torch_arrays import TorchArrays

    return TorchArrays(name)


def _fetched(plan: Plan) -> Plan:
    """The plan with every weight file it reads on this disk."""
    files: dict[int, set[str]] = {}
    for job in plan.jobs:
        for read in (*job.reads, *job.compare):
            files.setdefault(read.source, set()).add(read.tensor.file)
    sources = [
        replace(source, checkpoint=fetch(source.checkpoint, files.get(i, ()))) for i, source in enumerate(plan.sources)
    ]
    return replace(plan, sources=tuple(sources))


@contextlib.contextmanager
def open_sources(plan: Plan) -> Iterator[Sources]:
    """Open every file that a plan's jobs read."""
    with contextlib.ExitStack() as stack:
        readers: dict[tuple[int, str], Reader] = {}
        for job in plan.jobs:
            for read in (*job.reads, *job.compare):
                key = read.source, read.tensor.file
                if key not in readers:
                    checkpoint = plan.sources[read.source].checkpoint
                    reader = Reader(checkpoint.file(key[1]), checkpoint.headers.get(key[1]))
                    readers[key] = stack.enter_context(reader)
        yield Sources(readers, Arena(), threading.Event())


def _complete(plan: Plan, output: Path, provenance: Mapping[str, Any]) -> bool:
    """Whether a folder is this plan's result, as far as can be told without reading it."""
    sizes = {shard.file: shard.nbytes for shard in plan.shards}
    held = {path.name: path.stat().st_size for path in output.iterdir() if path.name in sizes}
    return provenance["plan"] == plan.digest and held == sizes


def _room(plan: Plan, output: Path, stage: Staging) -> None:
    """See that the disk has room for what is not laid out yet."""
    laid = sum(
        (stage.path / shard.file).stat().st_blocks * 512 for shard in plan.shards if (stage.path / shard.file).exists()
    )
    free = shutil.disk_usage(stage.path).free
    if free < plan.bytes_written - laid:
        what = f"the disk has {free / 1e9:.2f} GB free and the output takes {plan.bytes_written / 1e9:.2f} GB"
        raise RunError(what, str(output.parent), "make room or choose another output")


def _notes(outcomes: Mapping[str, Outcome]) -> list[str]:
    """What was found while running that a user should know."""
    notes = [
        f"{name} differs in {', '.join(outcome.unequal)}; it holds no floating numbers, so it was copied"
        for name, outcome in outcomes.items()
        if outcome.unequal
    ]
    return notes + [f"{name} is not finite: {_counts(outcome)}" for name, outcome in outcomes.items() if outcome.bad]


def _counts(outcome: Outcome) -> str:
    return ", ".join(f"{count} in {where}" for where, count in outcome.bad.items())


@dataclass
class _Engine:
    """Works through a plan's jobs into a staging folder."""

    plan: Plan
    stage: Staging
    backend: Backend
    progress: Progress
    allow_nonfinite: bool
    resumed: int = 0

    def run(self) -> dict[str, Outcome]:
        """Measure and merge; what every tensor came to, by name."""
        self._unchanged()
        with open_sources(self.plan) as sources, contextlib.ExitStack() as stack:
            writers = self._writers(stack)
            left = self._left(writers)
            outcomes = dict(self.stage.done)
            self.resumed = len(outcomes)
            pool = stack.enter_context(ThreadPoolExecutor(self.plan.memory.workers, "mergetool"))
            stack.callback(sources.stop.set)
            facts = self._facts(sources, pool, left)
            self.progress.start(sum(job.bytes_read + job.bytes_written for job in left), "merge")
            try:
                for job, outcome in self._merge(left, sources, facts, writers, pool):
                    outcomes[job.name] = outcome
            finally:
                sources.stop.set()
                self.progress.close()
            try:
                for writer in {id(writer): writer for writer, _ in writers.values()}.values():
                    writer.sync()
                for reader in sources.readers.values():
                    if reader.changed():
                        raise SourceChanged("the file changed while it was merged", str(reader.path), "run again")
            except RunError:
                self.stage.distrust()  # what was read was not the source, or what was written is not on the disk
                raise
        return outcomes

    def _unchanged(self) -> None:
        fix = "plan again, and leave the sources alone while they are merged"
        try:
            same = digest(self.plan.recipe, self.plan.sources, self.plan.shards) == self.plan.digest
        except OSError as error:
            what = f"a source's file cannot be read any more: {error.strerror}"
            raise SourceChanged(what, str(error.filename), fix) from error
        if not same:
            raise SourceChanged("a source's file changed after planning", fix=fix)

    def _writers(self, stack: contextlib.ExitStack) -> dict[str, tuple[Writer, int]]:
        """For each tensor the open file it goes to and its offset there."""
        places = {}
        for shard in self.plan.shards:
            writer = stack.enter_context(Writer(self.stage.path / shard.file, shard, resume=True))
            if writer.fresh:
                self.stage.forget(set(shard.header.entries))
            places.update({name: (writer, entry.start) for name, entry in shard.header.entries.items()})
        return places

    def _left(self, writers: Mapping[str, tuple[Writer, int]]) -> list[Job]:
        """The jobs to do: those not journalled, or whose bytes are not what the journal says."""
        for shard in self.plan.shards:
            names = [name for name in shard.header.entries if name in self.stage.done]
            if names:
                with Reader(self.stage.path / shard.file) as reader:
                    for name in names:
                        if tensor_digest(reader, shard.header.entries[name]) != self.stage.done[name].digest:
                            self.stage.forget({name})
        if not self.allow_nonfinite:  # an earlier run may have been told to
            self.stage.forget({name for name, outcome in self.stage.done.items() if outcome.bad})
        return [job for job in self.plan.jobs if job.name not in self.stage.done]

    def _facts(self, sources: Sources, pool: ThreadPoolExecutor, left: Sequence[Job]) -> Facts:
        if not any(job.facts for job in left):
            return {}
        return measure_model(self.plan, sources, self.backend, pool, self.stage.path / FOLDER)

    def _merge(
        self,
        jobs: Sequence[Job],
        sources: Sources,
        facts: Facts,
        writers: Mapping[str, tuple[Writer, int]],
        pool: ThreadPoolExecutor,
    ) -> Iterator[tuple[Job, Outcome]]:
        """Give jobs to the workers in order, a few ahead; a wide one is shared by all of them."""
        pending: dict[Future[Outcome], Job] = {}
        ahead = 2 * self.plan.memory.workers

        def collect(until: int) -> Iterator[tuple[Job, Outcome]]:
            while len(pending) > until:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    job = pending.pop(future)
                    yield job, self._settle(job, future.result())

        try:
            for job in jobs:
                sink = self._sink(job, *writers[job.name])
                if is_wide(self.plan, job):
                    yield from collect(0)
                    yield job, self._settle(job, work(self.plan, job, sources, self.backend, facts, sink, pool))
                else:
                    self._read_ahead(job, sources)
                    pending[pool.submit(work, self.plan, job, sources, self.backend, facts, sink)] = job
                    yield from collect(ahead)
            yield from collect(0)
        except BaseException as error:
            sources.stop.set()
            self._first_cause(pending, error)
            raise

    def _first_cause(self, pending: Mapping[Future[Any], Job], error: BaseException) -> None:
        """A job that gave up because another failed is not the news; raise that other's error instead."""
        for future in pending:
            future.cancel()
        if isinstance(error, Stopped):
            for future in pending:
                cause = None if future.cancelled() else future.exception()
                if isinstance(cause, MergetoolError):
                    raise cause

    def _read_ahead(self, job: Job, sources: Sources) -> None:
        for read in job.reads:
            sources.readers[read.source, read.tensor.file].advise(read.tensor.start, read.tensor.nbytes)

    def _sink(self, job: Job, writer: Writer, offset: int) -> Any:
        share = job.bytes_read / max(job.bytes_written, 1)

        def sink(piece: Array, start: int) -> None:
            writer.write(piece, offset + start)
            self.progress.advance(round(piece.nbytes * (1 + share)))

        return sink

    def _settle(self, job: Job, outcome: Outcome) -> Outcome:
        """Journal a job that is done, or stop at numbers that are not finite."""
        if outcome.bad and not self.allow_nonfinite:
            found = ", ".join(f"{count} in {where}" for where, count in outcome.bad.items())
            raise NonFinite(
                Problem(
                    f"`{job.name}` has values that are NaN or infinite: {found}",
                    fix="mend the source, `keep` the tensor of another one by a rule, or give `--allow-nonfinite`; "
                    f"what is done so far is kept in {self.stage.path.name}",
                )
            )
        self.stage.note(job.name, outcome)
        return outcome
