"""Which tensors go into which output file, laid out to the byte before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mergetool.storage.dtypes import DType
from mergetool.storage.header import Header, lay_out

# transformers refuses files whose metadata do not name a framework.
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file, known to the byte.

    Attributes:
        file: its name in the output folder.
        header: where each tensor goes.
        preamble: the bytes before the data: the 8-byte length and the JSON.
    """

    file: str
    header: Header
    preamble: bytes

    @property
    def nbytes(self) -> int:
        """The number of bytes of the whole file."""
        return self.header.file_size


def shard(tensors: Iterable[tuple[str, DType, tuple[int, ...]]], limit: int, stem: str = "model") -> tuple[Shard, ...]:
    """Deal ``tensors`` out, in order, to files of at most ``limit`` bytes of data each.

    A tensor larger than the limit gets a file of its own. One file is called ``model.safetensors``, several
    ``model-00001-of-00003.safetensors`` and so on, as on the Hub.

    Args:
        tensors: name, dtype and shape of each.
        limit: bytes, positive.
        stem: the first part of the files' names.

    Raises:
        HeaderError: two tensors in one file share a name, or a name cannot be written.
    """
    if limit <= 0:
        raise ValueError(f"the shard size must be positive, not {limit}")
    groups: list[list[tuple[str, DType, tuple[int, ...]]]] = [[]]
    room = limit
    for tensor in tensors:
        nbytes = tensor[1].nbytes(tensor[2])
        if groups[-1] and nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(tensor)
        room -= nbytes
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, 1):
        file = f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        shards.append(Shard(file, *lay_out(group, _METADATA)))
    return tuple(shards)


def index(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``: the sizes in all and the file of each tensor."""
    entries = [(entry, part.file) for part in shards for entry in part.header.entries.values()]
    return {
        "metadata": {
            "total_parameters": sum(entry.size for entry, _ in entries),
            "total_size": sum(entry.nbytes for entry, _ in entries),
        },
        "weight_map": dict(sorted((entry.name, file) for entry, file in entries)),
    }
