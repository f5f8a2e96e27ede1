"""Whether what was journalled is on the disk: every tensor read back and its digest compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path

from mergetool.execute.job import Outcome
from mergetool.storage.digest import tensor_digest
from mergetool.storage.reader import Reader
from mergetool.storage.shards import Shard


def spoilt(
    shards: Sequence[Shard],
    folder: Path,
    done: Mapping[str, Outcome],
    pool: Executor,
    told: Callable[[int], None] = lambda nbytes: None,
) -> set[str]:
    """The tensors whose bytes are not what was journalled, or whose file is not laid out as planned.

    Args:
        shards: the plan's files.
        folder: where they are.
        done: what was journalled, by tensor.
        pool: who reads.
        told: called with the bytes of each tensor that was read.

    Raises:
        RunError: the disk fails.
    """
    found: set[str] = set()
    for shard in shards:
        names = [name for name in shard.header.entries if name in done]
        if not names or not _laid_out(folder / shard.file, shard):
            found.update(names)
            continue
        with Reader(folder / shard.file, shard.header) as reader:

            def changed(name: str, reader: Reader = reader, shard: Shard = shard) -> bool:
                entry = shard.header.entries[name]
                told(entry.nbytes)
                return tensor_digest(reader, entry) != done[name].digest

            found.update(name for name, bad in zip(names, pool.map(changed, names), strict=True) if bad)
    return found


def _laid_out(path: Path, shard: Shard) -> bool:
    """Whether a file has the size and the header that were planned."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.preamble)) == shard.preamble
