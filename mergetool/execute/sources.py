"""A plan's sources opened for reading: fetched where they are on the Hub, every file open once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from mergetool.checkpoint.checkpoint import fetch
from mergetool.execute.buffers import Arena, Bytes, aligned
from mergetool.execute.tiles import Sources
from mergetool.plan import Plan
from mergetool.storage.reader import Reader


def fetched(plan: Plan) -> Plan:
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
def open_sources(plan: Plan, *, allocate: Callable[[int], Bytes] = aligned) -> Iterator[Sources]:
    """Open every file that a plan's jobs read.

    Args:
        plan: the plan.
        allocate: makes the workers' buffers.
    """
    with contextlib.ExitStack() as stack:
        readers: dict[tuple[int, str], Reader] = {}
        for job in plan.jobs:
            for read in (*job.reads, *job.compare):
                key = read.source, read.tensor.file
                if key not in readers:
                    checkpoint = plan.sources[read.source].checkpoint
                    reader = Reader(checkpoint.file(key[1]), checkpoint.headers.get(key[1]))
                    readers[key] = stack.enter_context(reader)
        yield Sources(readers, Arena(allocate), threading.Event())
