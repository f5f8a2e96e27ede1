"""Digests against the libraries that define them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import xxhash

from mergetool.errors import CheckpointError
from mergetool.storage import digest
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.reader import Reader
from mergetool.storage.writer import Writer, shard


@pytest.mark.parametrize("size", [0, 1, 64, 65, 200])
def test_a_tensor_digest_is_that_of_its_block_digests(tmp_path, monkeypatch, size):
    monkeypatch.setattr(digest, "BLOCK_BYTES", 64)
    (part,) = shard([("first", DTYPES["U8"], (3,)), ("x", DTYPES["U8"], (size,))], 1 << 20)
    data = np.arange(size, dtype=np.uint8)
    entry = part.header.entries["x"]
    with Writer(tmp_path / "f", part) as writer:
        writer.write(data, entry.start)
    blocks = [data[i : i + 64] for i in range(0, size, 64)]
    expected = xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(block.tobytes()) for block in blocks))
    with Reader(tmp_path / "f") as reader:
        assert digest.tensor_digest(reader, entry) == expected
    assert digest.combine([digest.block_digest(block) for block in blocks]) == expected


def test_a_file_digest_is_its_sha256(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "f").write_bytes(content)
    assert digest.file_digest(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckpointError):
        digest.file_digest(tmp_path / "absent")


def test_arrays_of_any_dtype_and_shape_are_bytes():
    array = np.arange(12, dtype="<u2").reshape(3, 4)
    assert digest.block_digest(array) == digest.block_digest(array.tobytes())
    assert digest.block_digest(np.empty((0, 4))) == digest.block_digest(b"")
    with pytest.raises(TypeError):
        digest.block_digest(array[:, ::2])
