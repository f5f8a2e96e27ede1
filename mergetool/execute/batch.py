"""Small jobs by the batch: which go to a worker together, and which of their reads lie side by side in a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mergetool.plan import Job, Read
from mergetool.plan.memory import BATCH_BYTES


def batches(jobs: Iterable[Job], alone: Callable[[Job], bool]) -> Iterator[list[Job]]:
    """Runs of neighbouring jobs for one worker."""
    batch: list[Job] = []
    room = BATCH_BYTES
    for job in jobs:
        nbytes = job.bytes_read
        room -= nbytes
        if batch and (room < 0 or alone(job)):
            yield batch
            batch, room = [], BATCH_BYTES - nbytes
        batch.append(job)
        if alone(job):
            yield batch
            batch, room = [], BATCH_BYTES
    if batch:
        yield batch


def large(read: Read) -> bool:
    """Whether a tensor is a batch of its own."""
    return read.tensor.nbytes >= BATCH_BYTES


@dataclass(frozen=True)
class Span:
    """Bytes of one file that are read together, and the tensors that are in them.

    Attributes:
        source: the source's place in the plan's.
        file: the file.
        start: the first byte.
        stop: the byte behind the last one.
        reads: the tensors, in the order in which they lie.
    """

    source: int
    file: str
    start: int
    stop: int
    reads: tuple[Read, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


def spans(jobs: Iterable[Job]) -> list[Span]:
    """What jobs read, each run of tensors that lie side by side in a file as one; no byte between them is in it."""
    places: dict[tuple[int, str], list[Read]] = defaultdict(list)
    for job in jobs:
        for read in (*job.reads, *job.compare):
            places[read.source, read.tensor.file].append(read)
    return [span for (source, file), reads in places.items() for span in _side_by_side(source, file, reads)]


def _side_by_side(source: int, file: str, reads: list[Read]) -> Iterator[Span]:
    reads = sorted(reads, key=lambda read: read.tensor.start)
    first, stop = 0, reads[0].tensor.start
    for i, read in enumerate(reads):
        if read.tensor.start > stop:
            yield Span(source, file, reads[first].tensor.start, stop, tuple(reads[first:i]))
            first = i
        stop = max(stop, read.tensor.start + read.tensor.nbytes)
    yield Span(source, file, reads[first].tensor.start, stop, tuple(reads[first:]))
