"""A command is measured whole: a short life's memory, all that it says, what it reads and writes."""

from __future__ import annotations

import sys

import pytest

from .measure import remove, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

BYTES = 64 << 20


def test_the_memory_of_a_process_that_ends_at_once_is_seen():
    idle = run([sys.executable, "-c", ""]).anonymous
    busy = run([sys.executable, "-c", f"bytearray(b'x') * {BYTES}; held = bytearray(b'x') * {BYTES}"]).anonymous
    assert 0.9 * BYTES < busy - idle < 1.1 * BYTES


def test_pages_of_files_are_not_anonymous_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(BYTES))
    look = f"import mmap; f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, access=1); sum(m[::4096])"
    assert run([sys.executable, "-c", look]).anonymous < BYTES / 2


def test_a_command_may_say_more_than_a_pipe_holds():
    cost = run([sys.executable, "-c", "import sys; print('x' * 1_000_000); print('!' * 1_000_000, file=sys.stderr)"])
    assert len(cost.output) == 1_000_001


def test_what_calls_read_and_write_is_counted(tmp_path):
    code = f"f = open({str(tmp_path / 'file')!r}, 'wb+'); f.write(bytes(5_000_000)); f.seek(0); f.read()"
    read, written = run([sys.executable, "-c", code]).called
    assert 5_000_000 <= written < 5_100_000
    assert read >= 5_000_000


def test_a_command_that_fails_is_quoted():
    with pytest.raises(RuntimeError, match=r"(?s)ended with 3:.*broken"):
        run([sys.executable, "-c", "import sys; print('broken', file=sys.stderr); sys.exit(3)"])


def test_what_was_written_before_is_removed(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert not list(tmp_path.iterdir())
