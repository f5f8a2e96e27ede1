"""Sources are never written to, and a run notices when somebody else writes to them."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
from plan.models import TIES, llama, planned, save

from execute.conftest import contents, fingerprint, tensors
from mergetool.errors import CheckpointError, RunError, SourceChanged
from mergetool.execute import batch, compute, run
from mergetool.storage import system

MODEL_SCOPE = f"{TIES}  scope: model\n"


@pytest.fixture
def undisturbed(folder, tmp_path_factory):
    """What a run gives that nobody disturbs."""
    output = tmp_path_factory.mktemp("undisturbed") / "merged"
    run(planned(folder), output)
    return contents(output)


def test_sources_are_opened_for_reading_only_and_stay_as_they_are(folder, tmp_path, monkeypatch):
    true, opened = os.open, []

    def watch(path, flags, *rest, **named):
        if any(name in os.fspath(path) for name in ("/base/", "/a/", "/b/")):
            opened.append(flags)
        return true(path, flags, *rest, **named)

    monkeypatch.setattr(system, "open_file", watch)
    before = {name: fingerprint(folder / name) for name in ("base", "a", "b")}
    run(planned(folder, MODEL_SCOPE), tmp_path / "merged")
    assert len(opened) >= 3
    assert all(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) == 0 for flags in opened)
    assert {name: fingerprint(folder / name) for name in ("base", "a", "b")} == before


def test_sources_in_folders_that_cannot_be_written_are_merged(folder, tmp_path):
    places = [path for name in ("base", "a", "b") for path in (folder / name, *(folder / name).iterdir())]
    modes = [path.stat().st_mode for path in places]
    for path, mode in zip(places, modes, strict=True):
        path.chmod(mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        run(planned(folder), tmp_path / "merged")
    finally:
        for path, mode in zip(places, modes, strict=True):
            path.chmod(mode)
    config = tmp_path / "merged" / "config.json"
    assert os.access(config, os.W_OK)
    assert config.stat().st_mode & stat.S_IWUSR


@pytest.mark.parametrize("name", ["base", "a", "b"])
def test_a_source_touched_after_planning_is_refused(folder, tmp_path, name):
    plan = planned(folder)
    path = folder / name / "model.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))
    with pytest.raises(SourceChanged, match="plan again"):
        run(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    run(planned(folder), tmp_path / "merged")


def test_a_source_replaced_after_planning_is_refused(folder, tmp_path):
    plan = planned(folder)
    save(folder / "a", llama(9))
    with pytest.raises(SourceChanged):
        run(plan, tmp_path / "merged")


def test_a_source_truncated_after_planning_is_refused(folder, tmp_path):
    plan = planned(folder)
    path = folder / "a" / "model.safetensors"
    time = path.stat().st_mtime_ns
    os.truncate(path, path.stat().st_size - 1)
    os.utime(path, ns=(time, time))
    for attempt in (lambda: run(plan, tmp_path / "merged"), lambda: compute(plan, plan.jobs[0])):
        with pytest.raises((SourceChanged, CheckpointError)):
            attempt()
    assert not (tmp_path / "merged").exists()


def test_a_source_removed_after_planning_is_named(folder, tmp_path):
    plan = planned(folder)
    path = folder / "b" / "model.safetensors"
    path.unlink()
    with pytest.raises(SourceChanged, match=str(path)):
        run(plan, tmp_path / "merged")


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """A tensor at a time, so that there is a moment between any two."""
    monkeypatch.setattr(batch, "BATCH_BYTES", 1)


class Saboteur:
    """Does something at the n-th call of one of the system's functions."""

    def __init__(self, monkeypatch, name, number, deed):
        self.true, self.number, self.deed, self.calls = getattr(system, name), number, deed, 0
        monkeypatch.setattr(system, name, self)

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.number:
            self.deed()
        return self.true(*arguments)


@pytest.mark.parametrize("moment", [1, 5, 10])
def test_a_source_touched_during_the_run_stops_it(folder, tmp_path, monkeypatch, undisturbed, moment):
    path = folder / "a" / "model.safetensors"
    with monkeypatch.context() as patch:
        Saboteur(patch, "pwrite", moment, lambda: os.utime(path, ns=(0, 12345)))
        with pytest.raises(SourceChanged, match="changed"):
            run(planned(folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    run(planned(folder), tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(folder / "base").keys()


@pytest.mark.parametrize("moment", [4, 12, 20])
def test_what_was_made_of_a_changed_source_is_not_counted_on_even_if_it_is_put_back(
    folder, tmp_path, monkeypatch, undisturbed, moment
):
    path = folder / "a" / "model.safetensors"
    whole, times = path.read_bytes(), path.stat()
    data = 8 + int.from_bytes(whole[:8], "little")

    def scribble():
        with path.open("r+b") as file:
            file.seek(data)
            file.write(bytes(len(whole) - data))
        os.utime(path, ns=(1, 1))

    plan = planned(folder, workers=1)
    with monkeypatch.context() as patch:
        Saboteur(patch, "preadv", moment, scribble)
        with pytest.raises(SourceChanged):
            run(plan, tmp_path / "merged")
    with path.open("r+b") as file:
        file.write(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    report = run(planned(folder), tmp_path / "merged")
    assert report.resumed == 0
    assert contents(tmp_path / "merged") == undisturbed


def test_a_source_truncated_while_it_is_read_is_told(folder, tmp_path, monkeypatch):
    path = folder / "b" / "model.safetensors"
    plan = planned(folder)
    Saboteur(monkeypatch, "preadv", 4, lambda: os.truncate(path, 600))
    with pytest.raises((CheckpointError, SourceChanged), match=str(path)):
        run(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_disk_that_fails_while_a_source_is_read_is_told(folder, tmp_path, monkeypatch, undisturbed):
    plan = planned(folder)

    def fail():
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        Saboteur(patch, "preadv", 7, fail)
        with pytest.raises(RunError, match="check the disk"):
            run(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    run(plan, tmp_path / "merged")
    assert contents(tmp_path / "merged") == undisturbed


def test_short_and_interrupted_reads_and_writes_do_not_show(folder, tmp_path, monkeypatch, undisturbed):
    numbers = np.random.default_rng(0)
    preadv, pwrite = system.preadv, system.pwrite
    fates = iter(numbers.integers(0, 3, 10**6).tolist())

    def halting(true):
        def call(fd, view, offset):
            fate = next(fates)
            if fate == 0:
                raise InterruptedError
            return true(fd, view[: max(1, len(view) // 3)] if fate == 1 else view, offset)

        return call

    monkeypatch.setattr(system, "preadv", halting(preadv))
    monkeypatch.setattr(system, "pwrite", halting(pwrite))
    run(planned(folder), tmp_path / "merged")
    assert contents(tmp_path / "merged") == undisturbed


def test_two_names_of_one_model_are_two_sources(folder, tmp_path):
    (folder / "twin").symlink_to(folder / "a")
    text = "merge_method: linear\nmodels: [{model: a}, {model: twin}]\nparameters: {weight: 1}\n"
    before = fingerprint(folder / "a")
    run(planned(folder, text), tmp_path / "merged")
    assert fingerprint(folder / "a") == before
