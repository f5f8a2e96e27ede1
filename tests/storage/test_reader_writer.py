"""Readers and writers: the library reads what we write, we read what it writes, faults end in errors."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from mergetool.errors import CheckpointError, OutputRefused, RunError, SourceChanged
from mergetool.storage import system
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.header import read_header
from mergetool.storage.reader import Reader
from mergetool.storage.writer import Writer, atomic_write, index, shard

EVERY = [(f"t.{name}", dtype, (3, 8)) for name, dtype in DTYPES.items()]
EVERY += [("scalar", DTYPES["F32"], ()), ("empty", DTYPES["BF16"], (0, 4))]


def content(part):
    rng = np.random.default_rng(7)
    return {name: rng.integers(0, 2, e.nbytes, np.uint8) for name, e in part.header.entries.items()}


def write(path, part, data):
    with Writer(path, part) as writer:
        for name, entry in reversed(part.header.entries.items()):
            writer.write(data[name], entry.start)
        writer.sync()


@pytest.fixture
def every(tmp_path):
    (part,) = shard(EVERY, 1 << 30)
    data = content(part)
    write(tmp_path / part.file, part, data)
    return tmp_path / part.file, part, data


def test_the_library_reads_every_dtype_that_we_write(every):
    path, part, data = every
    found = dict(safetensors.deserialize(path.read_bytes()))
    assert found.keys() == data.keys()
    for name, entry in part.header.entries.items():
        assert bytes(found[name]["data"]) == data[name].tobytes()
        assert (found[name]["dtype"], tuple(found[name]["shape"])) == (entry.dtype.name, entry.shape)


def test_torch_loads_what_we_write(tmp_path):
    tensors = [t for t in EVERY if not t[1].name.startswith(("F4", "F6"))]
    (part,) = shard(tensors, 1 << 30)
    write(tmp_path / part.file, part, content(part))
    loaded = safetensors.torch.load_file(tmp_path / part.file)
    assert {name: str(t.dtype) for name, t in loaded.items()} == {
        name: f"torch.{dtype.torch_name}" for name, dtype, _ in tensors
    }
    with safetensors.safe_open(tmp_path / part.file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_we_read_every_dtype_that_torch_saves(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {}
    for name, dtype in DTYPES.items():
        if hasattr(torch, dtype.torch_name) and name != "F4":
            raw = torch.arange(24 * dtype.bits // 8, dtype=torch.uint8)
            tensors[name] = (raw % 2 if name == "BOOL" else raw).view(getattr(torch, dtype.torch_name)).view(4, 6)
    safetensors.torch.save_file(tensors, path, {"format": "pt", "more": "é"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "more": "é"}
    with Reader(path, header) as reader:
        for name, tensor in tensors.items():
            raw = reader.read(header.entries[name])
            assert raw.dtype == DTYPES[name].storage
            assert raw.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
            np.testing.assert_array_equal(reader.read(header.entries[name], 5, 9), raw[5:9])


def test_the_same_shard_gives_the_same_bytes_from_any_number_of_threads(every, tmp_path):
    path, part, data = every
    with Writer(tmp_path / "again", part) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda e: writer.write(data[e.name], e.start), part.header.entries.values()))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_ranges_of_packed_elements_must_not_cut_bytes(every):
    path, part, data = every
    entry = part.header.entries["t.F4"]
    with Reader(path) as reader:
        assert reader.read(entry, 2, 6).tobytes() == data["t.F4"][1:3].tobytes()
        with pytest.raises(ValueError, match="cut through a byte"):
            reader.read(entry, 1, 6)
        with pytest.raises(ValueError, match="not inside"):
            reader.read(entry, 0, 25)


def test_short_calls_and_interruptions_are_made_whole(every, tmp_path, monkeypatch):
    path, part, data = every
    preadv, pwrite = system.preadv, system.pwrite
    calls = []

    def flaky(call):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise InterruptedError
        return call()

    monkeypatch.setattr(system, "preadv", lambda fd, view, at: flaky(lambda: preadv(fd, view[:5], at)))
    monkeypatch.setattr(system, "pwrite", lambda fd, view, at: flaky(lambda: pwrite(fd, view[:5], at)))
    write(tmp_path / "again", part, data)
    assert read_header(tmp_path / "again") == part.header
    with Reader(path) as reader:
        assert all(reader.read(e).tobytes() == data[name].tobytes() for name, e in part.header.entries.items())
    monkeypatch.undo()
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_a_write_outside_the_data_is_a_mistake_of_the_caller(every, tmp_path):
    _, part, _ = every
    with Writer(tmp_path / "other", part) as writer:
        for offset in (0, part.header.data_start - 1, part.nbytes - 7):
            with pytest.raises(ValueError, match="not inside"):
                writer.write(bytes(8), offset)


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("seam", ["open_file", "allocate", "pwrite", "fsync"])
@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, RunError, r"disk is full.*free some space"),
        (errno.EDQUOT, RunError, r"quota"),
        (errno.EROFS, OutputRefused, r"read-only"),
        (errno.EACCES, OutputRefused, r"permission denied"),
        (errno.EIO, RunError, r"disk reports an error.*check the disk"),
    ],
)
def test_a_failing_disk_names_the_file_and_the_remedy(tmp_path, monkeypatch, seam, number, kind, message):
    (part,) = shard(EVERY, 1 << 30)
    monkeypatch.setattr(system, seam, failing(number))
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        write(tmp_path / part.file, part, content(part))
    assert str(tmp_path / part.file) in str(caught.value)
    assert seam == "fsync" or not (tmp_path / part.file).exists()


def test_file_systems_that_cannot_reserve_are_served(tmp_path, monkeypatch):
    (part,) = shard(EVERY, 1 << 30)
    monkeypatch.setattr(system, "allocate", failing(errno.EOPNOTSUPP))
    write(tmp_path / part.file, part, content(part))
    assert read_header(tmp_path / part.file) == part.header


def test_a_write_that_makes_no_progress_ends(tmp_path, monkeypatch):
    (part,) = shard(EVERY, 1 << 30)
    monkeypatch.setattr(system, "pwrite", lambda *_: 0)
    with pytest.raises(RunError, match="disk reports an error"):
        Writer(tmp_path / part.file, part)


def test_a_failing_read_and_an_early_end_are_told_apart(every, monkeypatch):
    path, part, _ = every
    entry = part.header.entries["t.F64"]
    with Reader(path, part.header) as reader:
        os.truncate(path, entry.start + 3)
        with pytest.raises(CheckpointError, match=r"is truncated[\s\S]*download it again"):
            reader.read(entry)
        monkeypatch.setattr(system, "preadv", failing(errno.EIO))
        with pytest.raises(RunError, match="disk reports an error while this file is read"):
            reader.read(entry)


def test_a_source_that_changes_is_noticed(every):
    path, part, _ = every
    with Reader(path, part.header) as reader:
        reader.advise(0, 1 << 20)
        assert not reader.changed()
        path.write_bytes(path.read_bytes() + b"x")
        assert reader.changed()
        with pytest.raises(SourceChanged):
            Reader(path, part.header)
        path.unlink()
        assert reader.changed()


def test_a_writer_resumes_only_a_file_laid_out_for_the_same_shard(every):
    path, part, _ = every
    before = path.read_bytes()
    with Writer(path, part, resume=True) as writer:
        assert not writer.fresh
    assert path.read_bytes() == before
    (other,) = shard(EVERY[:-1], 1 << 30)
    with Writer(path, other, resume=True) as writer:
        assert writer.fresh
    assert read_header(path) == other.header
    path.unlink()
    with Writer(path, part, resume=True) as writer:
        assert writer.fresh


@pytest.mark.parametrize("resume", [False, True])
def test_a_link_at_the_output_is_replaced_and_its_target_kept(every, tmp_path, resume):
    path, part, _ = every
    before = path.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(path)
    with Writer(link, part, resume=resume) as writer:
        assert writer.fresh
    assert path.read_bytes() == before
    assert not link.is_symlink()


def test_shards_keep_the_order_and_the_limit():
    u8 = DTYPES["U8"]
    parts = shard([(str(i), u8, (n,)) for i, n in enumerate([4, 6, 1, 50, 0, 10])], 10)
    assert [list(p.header.entries) for p in parts] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert parts[2].file == "model-00003-of-00004.safetensors"
    assert index(parts)["metadata"] == {"total_parameters": 71, "total_size": 71}
    assert index(parts)["weight_map"]["4"] == parts[3].file
    (only,) = shard([], 10, "adapter")
    assert only.file == "adapter.safetensors"
    with pytest.raises(ValueError, match="positive"):
        shard([], 0)


def test_an_atomic_write_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    for seam in ("pwrite", "fsync", "rename"):
        monkeypatch.setattr(system, seam, failing(errno.ENOSPC))
        with pytest.raises(RunError, match="disk is full"):
            atomic_write(path, b"new")
        monkeypatch.undo()
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.json"]
    atomic_write(path, b"new")
    assert path.read_text() == "new"
