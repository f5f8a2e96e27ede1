"""A plan's sources opened for reading: fetched where they are on the Hub, every file open once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from mergetool.anatomy import Turning
from mergetool.checkpoint.checkpoint import fetch
from mergetool.execute.buffers import Arena, Bytes, aligned
from mergetool.execute.tiles import Sources
from mergetool.execute.turns import Turns
from mergetool.plan import Plan
from mergetool.storage.reader import Reader

NOTHING: Mapping[int, Turning] = MappingProxyType({})
"""No source is turned."""


def fetched(plan: Plan, turnings: Mapping[int, Turning] = NOTHING) -> Plan:
    """The plan with every weight file it reads on this disk.

    Args:
        plan: the plan.
        turnings: what is turned, by the place of the source in the plan's sources.

    Raises:
        CheckpointError: a file cannot be fetched, or tensors that change places are not stored alike.
    """
    files: dict[int, set[str]] = {}
    for source, file in _files(plan, Turns(plan, turnings)):
        files.setdefault(source, set()).add(file)
    sources = [
        replace(source, checkpoint=fetch(source.checkpoint, files.get(i, ()))) for i, source in enumerate(plan.sources)
    ]
    return replace(plan, sources=tuple(sources))


def _files(plan: Plan, turns: Turns) -> Iterator[tuple[int, str]]:
    """Every source and file that is read; of tensors that change places, both files."""
    for job in plan.jobs:
        for read in (*job.reads, *job.compare):
            yield read.source, read.tensor.file
            yield read.source, turns.tensor(read).file


@contextlib.contextmanager
def open_sources(
    plan: Plan, turnings: Mapping[int, Turning] = NOTHING, *, allocate: Callable[[int], Bytes] = aligned
) -> Iterator[Sources]:
    """Open every file that a plan's jobs read.

    Args:
        plan: the plan.
        turnings: what is turned while it is read, by the place of the source in the plan's sources.
        allocate: makes the buffers that inputs are read into.

    Raises:
        CheckpointError: a file cannot be opened, or tensors that change places are not stored alike.
        SourceChanged: a file is not what it was when the plan was made.
    """
    turns = Turns(plan, turnings)
    with contextlib.ExitStack() as stack:
        readers: dict[tuple[int, str], Reader] = {}
        for key in dict.fromkeys(_files(plan, turns)):
            checkpoint = plan.sources[key[0]].checkpoint
            reader = Reader(checkpoint.file(key[1]), checkpoint.headers.get(key[1]))
            readers[key] = stack.enter_context(reader)
        yield Sources(readers, Arena(allocate), Arena(allocate), threading.Event(), turns=turns if turnings else None)
