"""Digests of tensors, block by block so that they can be taken while data stream by, and of small files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from mergetool.storage import system
from mergetool.storage.header import Entry, open_source
from mergetool.storage.reader import Reader
from mergetool.storage.system import Buffer

BLOCK_BYTES = 256 << 10
"""The bytes of a block; every block of a tensor but the last is this long. A tile of any size is a whole number."""


def block_digest(buffer: Buffer) -> bytes:
    """The 16-byte xxh3-128 digest of one contiguous block of at most :data:`BLOCK_BYTES`."""
    return bytes(xxhash.xxh3_128_digest(system.as_bytes(buffer)))


def combine(blocks: Sequence[bytes]) -> str:
    """The digest of a tensor from those of its blocks, in order: xxh3-128 of them all, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(b"".join(blocks)))


def tensor_digest(reader: Reader, entry: Entry) -> str:
    """The digest of a tensor on disk, read one block at a time.

    Raises:
        CheckpointError: the file ends too early.
        RunError: the disk fails.
    """
    block = np.empty(min(BLOCK_BYTES, entry.nbytes), np.uint8)
    blocks = []
    for start in range(entry.start, entry.stop, BLOCK_BYTES):
        part = block[: entry.stop - start]
        reader.read_into(part, start)
        blocks.append(block_digest(part))
    return combine(blocks)


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a whole file, in hexadecimal: what `sha256sum` and the Hub call it.

    Raises:
        CheckpointError: the file cannot be opened.
        RunError: the disk fails.
    """
    path = Path(path)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    offset = 0
    fd = open_source(path)
    try:
        while count := system.read_all(fd, buffer, offset):
            digest.update(buffer[:count])
            offset += count
    except OSError as error:
        raise system.read_failure(error, path) from error
    finally:
        system.drop(fd)
    return digest.hexdigest()
