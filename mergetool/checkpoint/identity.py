"""What tells a model from others: its commit; or files, layout, config and some bytes of every tensor."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergetool.checkpoint.checkpoint import Checkpoint
from mergetool.storage.reader import Reader

_SOME = 4096
"""Bytes of each tensor that are looked at."""


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a model's weights from others: its commit, or each weight file's size, time and some of its bytes; and
    its config.

    Fine-tunes have files of one size, and out of an archive often of one time.
    """
    found: dict[str, Any] = {"commit": checkpoint.commit}
    if checkpoint.commit is None:
        looks = some_bytes(checkpoint)
        found["files"] = [
            [*size_and_time(checkpoint, name), look] for name, look in zip(checkpoint.weight_files, looks, strict=True)
        ]
    return {**found, "layout": layout(checkpoint)}


def layout(checkpoint: Checkpoint) -> str:
    """A digest of where every tensor lies, and of the config: all that is known without a look at weights."""
    places = [(t.name, t.dtype.name, t.shape, t.file, t.start) for t in checkpoint.tensors.values()]
    return hashlib.sha256(json.dumps([places, checkpoint.config], sort_keys=True).encode()).hexdigest()


def size_and_time(checkpoint: Checkpoint, name: str) -> tuple[str, int, int]:
    """The name of a file, its size and when it was changed.

    Raises:
        OSError: it is not there any more.
    """
    stat = os.stat(checkpoint.file(name))
    return name, stat.st_size, stat.st_mtime_ns


def some_bytes(checkpoint: Checkpoint) -> list[str]:
    """For each weight file a digest of the middle of every tensor in it.

    Raises:
        OSError: a file is not there any more.
        CheckpointError: it cannot be opened, or ends early.
    """
    middles: dict[str, list[tuple[int, int]]] = {name: [] for name in checkpoint.weight_files}
    for tensor in checkpoint.tensors.values():
        start = tensor.start + max(0, tensor.nbytes - _SOME) // 2
        middles[tensor.file].append((start, min(tensor.nbytes, _SOME)))
    return [_looked_at(checkpoint.file(name), places) for name, places in middles.items()]


def _looked_at(path: Path, places: list[tuple[int, int]]) -> str:
    stat = os.stat(path)
    return _digest(path, tuple(places), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _digest(path: Path, places: tuple[tuple[int, int], ...], *_stat: int) -> str:
    """A digest of some places of a file; it is asked for often, and read once while the file stays."""
    found = hashlib.sha256()
    with Reader(path) as reader:
        for start, nbytes in places:  # so that a disk is asked for all at once, and not for one after the other
            reader.advise(start, nbytes)
        for start, nbytes in places:
            some = bytearray(nbytes)
            reader.read_into(some, start)
            found.update(some)
    return found.hexdigest()
