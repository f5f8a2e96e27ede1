"""Writes past the page cache: the same bytes whatever the file system lets us do, wherever pieces begin and end."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from mergetool.errors import RunError
from mergetool.execute.buffers import aligned
from mergetool.storage import system
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.system import PAGE
from mergetool.storage.writer import DIRECT_BYTES, Writer, shard

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writes")
SIZES = (DIRECT_BYTES * 3, 7, DIRECT_BYTES + 24, 8 * 5, DIRECT_BYTES * 2 + 1, DIRECT_BYTES - 8)


@pytest.fixture
def part():
    (part,) = shard([(f"t{i}", DTYPES["U8"], (size,)) for i, size in enumerate(SIZES)], 1 << 30)
    return part


@pytest.fixture
def flags(monkeypatch):
    """How each file that is written is open, in the order of the writes: True for direct."""
    found = []
    true = system.pwrite

    def watch(fd, view, offset):
        with open(f"/proc/self/fdinfo/{fd}") as info:
            word = next(line.split()[1] for line in info if line.startswith("flags"))
        direct = bool(int(word, 8) & os.O_DIRECT)
        found.append((direct, offset % PAGE, len(view) % PAGE, len(view)))
        return true(fd, view, offset)

    monkeypatch.setattr(system, "pwrite", watch)
    return found


def piece(nbytes, place):
    """Random bytes that begin ``place`` bytes after a page of memory."""
    buffer = aligned(nbytes + PAGE)[place : place + nbytes]
    buffer[:] = np.random.default_rng(nbytes + place).integers(0, 256, nbytes, np.uint8)
    return buffer


def write(path, part, shift=0):
    """Write every tensor from where its bytes would lie in mapped memory, ``shift`` bytes off; what was written."""
    pieces = {}
    with Writer(path, part) as writer:
        for name, entry in reversed(part.header.entries.items()):
            pieces[name] = piece(entry.nbytes, (entry.start + shift) % PAGE)
            writer.write(pieces[name], entry.start)
        writer.sync()
    return pieces


def holds(path, part, pieces):
    raw = np.fromfile(path, np.uint8)
    assert raw.size == part.nbytes
    return all(
        np.array_equal(raw[entry.start : entry.stop], pieces[entry.name]) for entry in part.header.entries.values()
    )


def test_the_data_of_a_shard_begin_on_a_page(part):
    assert part.header.data_start % PAGE == 0


def test_whole_pages_are_written_directly_and_the_rest_through_the_cache(part, tmp_path, flags):
    pieces = write(tmp_path / "m", part)
    assert holds(tmp_path / "m", part, pieces)
    direct = [call for call in flags if call[0]]
    if not direct:
        pytest.skip("this file system has no direct writes")
    assert len(direct) == 2  # of the third large one too little is left between the pages that it shares
    assert all(offset == length == 0 for _, offset, length, _ in direct)
    assert sum(length for _, _, _, length in direct) > 5 * DIRECT_BYTES - 2 * PAGE


def test_pieces_that_lie_elsewhere_in_memory_go_through_the_cache(part, tmp_path, flags):
    pieces = write(tmp_path / "m", part, shift=8)
    assert holds(tmp_path / "m", part, pieces)
    assert not any(direct for direct, *_ in flags)


def test_a_file_system_without_direct_files_gets_the_same_bytes(part, tmp_path, flags, monkeypatch):
    true = system.open_file

    def refuse(path, how, *mode):
        if how & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true(path, how, *mode)

    monkeypatch.setattr(system, "open_file", refuse)
    pieces = write(tmp_path / "m", part)
    assert holds(tmp_path / "m", part, pieces)
    assert not any(direct for direct, *_ in flags)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_writes_is_asked_once(part, tmp_path, monkeypatch, code):
    true, refused = system.pwrite, []

    def refuse(fd, view, offset):
        with open(f"/proc/self/fdinfo/{fd}") as info:
            word = next(line.split()[1] for line in info if line.startswith("flags"))
        if int(word, 8) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(code, os.strerror(code))
        return true(fd, view, offset)

    monkeypatch.setattr(system, "pwrite", refuse)
    pieces = write(tmp_path / "m", part)
    monkeypatch.undo()
    assert holds(tmp_path / "m", part, pieces)
    assert len(refused) <= 1


@pytest.mark.parametrize("step", [5, PAGE, 3 * PAGE, 10_000])
def test_short_writes_are_made_whole(part, tmp_path, monkeypatch, step):
    true = system.pwrite
    monkeypatch.setattr(system, "pwrite", lambda fd, view, at: true(fd, view[: max(step, len(view) // 50)], at))
    pieces = write(tmp_path / "m", part)
    monkeypatch.undo()
    assert holds(tmp_path / "m", part, pieces)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_says_so(part, tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with Writer(tmp_path / "m", part) as writer:
        monkeypatch.setattr(system, "pwrite", fail)
        entry = part.header.entries["t0"]
        with pytest.raises(RunError):
            writer.write(piece(entry.nbytes, entry.start % PAGE), entry.start)


def test_only_what_goes_through_the_cache_waits_for_a_flush(part, tmp_path, flags):
    with Writer(tmp_path / "m", part) as writer:
        entry = part.header.entries["t0"]
        writer.write(piece(entry.nbytes, entry.start % PAGE), entry.start)
        direct = any(call[0] for call in flags)
        assert writer.cached == (0 if direct else entry.nbytes)
        writer.write(piece(7, 0), part.header.entries["t1"].start)
        assert writer.cached == (7 if direct else entry.nbytes + 7)
        writer.sync()
        assert writer.cached == 0
