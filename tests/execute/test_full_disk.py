"""A disk that is full or fails at any moment leaves no output, and a later run completes with the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from types import SimpleNamespace

import pytest
from plan.models import TIES, planned

from execute.conftest import contents
from mergetool.errors import OutputRefused, RunError
from mergetool.execute import run
from mergetool.storage import system

MODEL_SCOPE = f"{TIES}  scope: model\n"


@pytest.fixture(scope="module")
def plan(shared):
    return planned(shared, MODEL_SCOPE, shard_size=400, workers=2)


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "merged"
    run(plan, output)
    return contents(output)


class Failing:
    """A function of the system that fails at its n-th call, and at every later one until it is mended."""

    def __init__(self, patch, name, number, code=errno.ENOSPC, once=False):
        self.true, self.number, self.code, self.calls = getattr(system, name), number, code, 0
        self.name, self.once, self.guard = name, once, threading.Lock()
        patch.setattr(system, name, self)

    def __call__(self, *arguments):
        if self.name == "open_file" and not arguments[1] & os.O_CREAT:  # a full disk can still be read
            return self.true(*arguments)
        with self.guard:
            self.calls += 1
            failing = self.calls == self.number or (self.calls > self.number and not self.once)
        if failing:
            raise OSError(self.code, os.strerror(self.code))
        return self.true(*arguments)


def calls(plan, output, monkeypatch, name):
    """How often a run calls one of the system's functions."""
    with monkeypatch.context() as patch:
        counter = Failing(patch, name, 1 << 60)
        run(plan, output)
    return counter.calls


@pytest.mark.parametrize("once", [False, True], ids=["from then on", "once"])
@pytest.mark.parametrize("name", ["allocate", "pwrite", "fsync", "rename", "open_file"])
def test_no_space_at_any_call_stops_the_run_and_the_next_completes_it(
    plan, undisturbed, tmp_path, monkeypatch, name, once
):
    total = calls(plan, tmp_path / "counted", monkeypatch, name)
    assert total >= (1 if name == "rename" else 3)
    numbers = sorted({*range(1, total + 1, 1 + total // 16), total})
    for number in numbers:
        output = tmp_path / f"{name}{number}"
        with monkeypatch.context() as patch:
            Failing(patch, name, number, once=once)
            with pytest.raises((RunError, OSError)) as stopped:
                run(plan, output)
        assert isinstance(stopped.value, RunError), f"call {number} of {total}: {stopped.value!r}"
        (problem,) = stopped.value.problems
        assert problem.where, problem
        assert problem.fix, problem
        if output.exists():  # only what comes after the folder has its name may fail so late
            assert number >= total - 1
            assert contents(output) == undisturbed
        assert not run(plan, output).unchanged or number >= total - 1
        assert contents(output) == undisturbed, number
        assert {path.name for path in tmp_path.glob(f".{name}{number}.*")} == set()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "disk reports an error"),
        (errno.EFBIG, "file this large"),
    ],
)
@pytest.mark.parametrize("name", ["allocate", "pwrite"])
def test_the_message_says_what_happened_where_and_what_to_do(plan, tmp_path, monkeypatch, name, code, words):
    Failing(monkeypatch, name, 2, code)
    with pytest.raises(RunError, match=words) as stopped:
        run(plan, tmp_path / "merged")
    (problem,) = stopped.value.problems
    assert str(tmp_path / ".merged.partial") in problem.where
    assert problem.fix
    assert stopped.value.exit_code == 4
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_place_that_cannot_be_written_is_refused(plan, tmp_path, monkeypatch, code):
    Failing(monkeypatch, "pwrite", 1, code)
    with pytest.raises(OutputRefused):
        run(plan, tmp_path / "merged")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(plan, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    with pytest.raises(OutputRefused, match="cannot be written"):
        run(plan, home / "merged")


def test_a_place_under_a_file_is_refused(plan, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputRefused, match="cannot be written"):
        run(plan, tmp_path / "file" / "merged")
    assert (tmp_path / "file").read_text() == "mine"


def test_after_a_failed_sync_nothing_written_before_is_counted_on(plan, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        # The facts are synced first, as a file and as a folder's entry; then comes the first shard.
        Failing(patch, "fsync", 3, errno.EIO)
        with pytest.raises(RunError, match="disk"):
            run(plan, tmp_path / "merged")
    assert run(plan, tmp_path / "merged").resumed == 0
    assert contents(tmp_path / "merged") == undisturbed


def test_a_file_system_without_allocation_gives_the_same_bytes(plan, undisturbed, tmp_path, monkeypatch):
    Failing(monkeypatch, "allocate", 1, errno.EOPNOTSUPP)
    run(plan, tmp_path / "merged")
    assert contents(tmp_path / "merged") == undisturbed


def test_too_little_space_is_told_before_anything_is_written(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
    with pytest.raises(RunError, match=r"0\.00 GB free") as stopped:
        run(plan, tmp_path / "merged")
    assert stopped.value.problems[0].fix
    assert not list((tmp_path / ".merged.partial").glob("*.safetensors"))
