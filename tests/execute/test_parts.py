"""A run in parts gives the bytes of a single run, whoever makes which part when, and says what is missing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from plan.models import TIES, planned

from execute.conftest import contents, tensors
from mergetool.errors import NonFinite, OutputRefused, RunError
from mergetool.execute import measure, run
from mergetool.execute.parts import finish, run_part
from mergetool.plan.parts import Share
from mergetool.storage import system

MODEL_SCOPE = f"{TIES}  scope: model\n"


@pytest.fixture(scope="module")
def plan(shared):
    return planned(shared, MODEL_SCOPE, shard_size=1000)


@pytest.fixture(scope="module")
def single(plan, tmp_path_factory):
    """The files of a single run."""
    output = tmp_path_factory.mktemp("single") / "merged"
    run(plan, output)
    return contents(output)


def in_parts(plan, output, parts, order=None):
    """Run the parts one after the other; the report of the last."""
    shares = list(order or Share(1, parts).all())
    return [run_part(plan, share, output) for share in shares][-1]


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 50])
def test_parts_in_any_order_make_the_bytes_of_a_single_run(plan, single, tmp_path, parts):
    output = tmp_path / "merged"
    shares = list(Share(1, parts).all())
    random.Random(parts).shuffle(shares)
    filled = {share for share in shares if share.of(plan.jobs)}
    for number, share in enumerate(shares, 1):
        report = run_part(plan, share, output)
        assert set(report.missing) == filled - set(shares[:number])
        assert report.digests.keys() == {job.name for job in share.of(plan.jobs)}
        assert not output.exists()
    report = finish(plan, output)
    assert report.digests == run(plan, tmp_path / "other").digests
    assert contents(output) == single
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "other"}


SLERP = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 0.4}\n"


@pytest.mark.parametrize("text", [TIES, TIES.replace("ties", "dare_ties"), SLERP])
def test_other_methods_too(shared, tmp_path, text):
    plan = planned(shared, text)
    run(plan, tmp_path / "single")
    in_parts(plan, tmp_path / "merged", 3)
    finish(plan, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "single")


def test_finishing_twice_changes_nothing(plan, single, tmp_path):
    output = tmp_path / "merged"
    in_parts(plan, output, 2)
    assert not finish(plan, output).unchanged
    for force in (False, True):
        assert finish(plan, output, force=force).unchanged
    again = run_part(plan, Share(2, 2), output)
    assert (again.unchanged, again.missing) == (True, ())
    assert run(plan, output).unchanged
    assert contents(output) == single


def test_parts_run_at_the_same_time_in_processes_of_their_own(shared, tmp_path):
    recipe, output = shared / "merge.yaml", tmp_path / "merged"
    plan = planned(shared, MODEL_SCOPE)
    command = [sys.executable, "-m", "mergetool.cli", "run", str(recipe), str(output), "--quiet", "--part"]
    running = [subprocess.Popen([*command, f"{part}/3"]) for part in (1, 2, 3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    finish(plan, output)
    run(plan, tmp_path / "single")
    assert contents(output) == contents(tmp_path / "single")


def test_parts_that_start_together_lay_a_file_out_once_and_measure_once(plan, single, tmp_path, monkeypatch):
    output, reports, laid, measured = tmp_path / "merged", [], [], []
    allocate, cuts = system.allocate, measure.cuts

    def slow_allocate(fd, nbytes):
        laid.append(nbytes)
        time.sleep(0.02)
        allocate(fd, nbytes)

    def slow_cuts(*arguments):
        measured.append(1)
        time.sleep(0.05)
        return cuts(*arguments)

    monkeypatch.setattr(system, "allocate", slow_allocate)
    monkeypatch.setattr(measure, "cuts", slow_cuts)
    threads = [
        threading.Thread(target=lambda share=share: reports.append(run_part(plan, share, output)))
        for share in Share(1, 4).all()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.share.part for report in reports) == [1, 2, 3, 4]
    assert (len(laid), len(measured)) == (len(plan.shards), 1)
    assert min(len(report.missing) for report in reports) == 0
    finish(plan, output)
    assert contents(output) == single


SLOW_PART = """
import os, sys, time
from pathlib import Path
import mergetool
from mergetool.execute import batch
from mergetool.execute.parts import run_part
from mergetool.plan.parts import Share
from mergetool.storage import system
batch.BATCH_BYTES = 1  # a tensor at a time, so that there is a moment between any two
true = system.pwrite
def pwrite(*arguments):
    os.write(1, b"write\\n")
    time.sleep(0.05)
    return true(*arguments)
system.pwrite = pwrite
plan = mergetool.build(mergetool.load(Path(sys.argv[1])), workers=2)
run_part(plan, Share(int(sys.argv[3]), int(sys.argv[4])), sys.argv[2])
"""


def start(recipe, output, share, writes):
    """A slow part in a process of its own, after so many writes."""
    arguments = [sys.executable, "-c", SLOW_PART, recipe, output, share.part, share.parts]
    process = subprocess.Popen(list(map(str, arguments)), stdout=subprocess.PIPE)
    assert [process.stdout.readline() for _ in range(writes)] == [b"write\n"] * writes
    return process


def end(process):
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()


@pytest.mark.parametrize("writes", [1, 3, 6])
def test_a_part_that_was_killed_continues(shared, tmp_path, writes):
    plan, output = planned(shared, MODEL_SCOPE), tmp_path / "merged"
    end(start(shared / "merge.yaml", output, Share(1, 2), writes))
    run_part(plan, Share(2, 2), output)
    with pytest.raises(RunError, match="part 1/2"):
        finish(plan, output)
    assert run_part(plan, Share(1, 2), output).missing == ()
    assert finish(plan, output).resumed == 0
    run(plan, tmp_path / "single")
    assert contents(output) == contents(tmp_path / "single")


def test_while_a_part_runs_only_other_parts_may(shared, tmp_path):
    plan, output = planned(shared, MODEL_SCOPE), tmp_path / "merged"
    process = start(shared / "merge.yaml", output, Share(1, 2), 4)
    try:
        for act in (lambda: run(plan, output), lambda: run(plan, output, force=True), lambda: finish(plan, output)):
            with pytest.raises(OutputRefused, match="part 1/2 of this output is running"):
                act()
        with pytest.raises(OutputRefused, match="running already"):
            run_part(plan, Share(1, 2), output)
        assert run_part(plan, Share(2, 2), output).missing == (Share(1, 2),)
    finally:
        end(process)
    run(plan, output)
    run(plan, tmp_path / "single")
    assert contents(output) == contents(tmp_path / "single")


def test_while_the_whole_is_made_no_part_may(folder, runner):
    (folder / "merge.yaml").write_text(TIES)
    plan = planned(folder)
    first = runner.start(folder / "merge.yaml", folder / "merged")
    runner.wait_for(3)
    with pytest.raises(OutputRefused, match="another run"):
        run_part(plan, Share(1, 2), folder / "merged")
    runner.kill(first, signal.SIGKILL)
    in_parts(plan, folder / "merged", 2)
    finish(plan, folder / "merged")
    run(plan, folder / "single")
    assert contents(folder / "merged") == contents(folder / "single")


def test_finish_names_the_parts_to_run(plan, single, tmp_path):
    output = tmp_path / "merged"
    with pytest.raises(RunError, match="nothing was begun"):
        finish(plan, output)
    assert list(tmp_path.iterdir()) == []
    run_part(plan, Share(2, 3), output)
    with pytest.raises(RunError) as failed:
        finish(plan, output)
    assert failed.value.exit_code == 4
    assert [problem.what.split(":")[0] for problem in failed.value.problems] == [
        "part 1/3 was not run",
        "part 3/3 was not run",
    ]
    assert [problem.fix for problem in failed.value.problems] == [
        "run it with `--part 1/3`",
        "run it with `--part 3/3`",
    ]
    assert not output.exists()
    in_parts(plan, output, 3)
    finish(plan, output)
    assert contents(output) == single


@pytest.mark.parametrize("harm", ["flipped", "removed", "header"])
def test_finish_reads_every_tensor_and_names_the_part_of_one_that_is_spoilt(plan, single, tmp_path, harm):
    output = tmp_path / "merged"
    in_parts(plan, output, 3)
    for number, job in enumerate(plan.jobs):
        shard = next(shard for shard in plan.shards if job.name in shard.header.entries)
        path = tmp_path / ".merged.partial" / shard.file
        raw = bytearray(path.read_bytes())
        entry = shard.header.entries[job.name]
        raw[9 if harm == "header" else random.Random(number).randrange(entry.start, entry.stop)] ^= 1
        path.unlink() if harm == "removed" else path.write_bytes(raw)
        with pytest.raises(RunError, match="not what was written") as failed:
            finish(plan, output)
        assert f"`{job.name}`" in str(failed.value)
        named = [share for share in Share(1, 3).all() if f"`--part {share}`" in str(failed.value)]
        for share in named:
            assert run_part(plan, share, output).resumed < len(share.of(plan.jobs))
        assert any(job in share.of(plan.jobs) for share in named)
    finish(plan, output)
    assert contents(output) == single


def test_other_counts_of_parts_and_other_plans_are_refused(plan, shared, single, tmp_path):
    output, other = tmp_path / "merged", planned(shared, TIES, shard_size=1000)
    run_part(plan, Share(1, 2), output)
    before = contents(tmp_path)
    with pytest.raises(OutputRefused, match="made in 2 parts") as refused:
        run_part(plan, Share(1, 3), output)
    assert "--part N/2" in refused.value.problems[0].fix
    for act in (lambda: run_part(other, Share(2, 2), output), lambda: finish(other, output)):
        with pytest.raises(OutputRefused, match="another recipe"):
            act()
    kept = {name: content for name, content in contents(tmp_path).items() if ".lock" not in name}
    assert kept == {name: content for name, content in before.items() if ".lock" not in name}
    run_part(plan, Share(2, 2), output)
    finish(plan, output)
    assert contents(output) == single


def test_a_run_of_the_whole_takes_over_what_parts_have_made(plan, single, tmp_path):
    output, share = tmp_path / "merged", Share(2, 3)
    run_part(plan, share, output)
    assert run(plan, output).resumed == len(share.of(plan.jobs)) > 0
    assert contents(output) == single


def test_parts_take_over_what_a_run_of_the_whole_has_made(plan, single, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[run.__module__], "publish", _full)
        with pytest.raises(RunError):
            run(plan, output)
    reports = [run_part(plan, share, output) for share in Share(1, 3).all()]
    assert sum(report.resumed for report in reports) > 0
    finish(plan, output)
    assert contents(output) == single


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_run_of_another_recipe_does_not_keep_parts(shared, plan, tmp_path):
    run_part(plan, Share(1, 2), tmp_path / "merged")
    other = planned(shared, TIES, shard_size=1000)
    assert run(other, tmp_path / "merged").resumed == 0
    run(other, tmp_path / "single")
    assert contents(tmp_path / "merged") == contents(tmp_path / "single")


@pytest.mark.parametrize("cut", [0, 1, 70, 150, 400])
def test_a_parts_journal_cut_at_any_byte_is_continued(plan, single, tmp_path, cut):
    output = tmp_path / "merged"
    in_parts(plan, output, 2)
    journal = tmp_path / ".merged.partial" / ".journal-1-of-2.jsonl"
    os.truncate(journal, cut)
    with pytest.raises(RunError, match="part 1/2"):
        finish(plan, output)
    run_part(plan, Share(1, 2), output)
    finish(plan, output)
    assert contents(output) == single


def test_facts_are_measured_by_the_first_part_alone(plan, single, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    run_part(plan, Share(2, 3), output)
    monkeypatch.setattr(measure, "cuts", None)
    run_part(plan, Share(1, 3), output)
    run_part(plan, Share(3, 3), output)
    finish(plan, output)
    assert contents(output) == single


def test_what_is_not_finite_stops_its_part_and_the_others_go_on(folder):
    path = folder / "a" / "model.safetensors"
    name, (_, values) = list(tensors(folder / "a").items())[-1]
    raw = bytearray(path.read_bytes())
    place = raw.rindex(np.ascontiguousarray(values).tobytes())
    raw[place : place + 2] = b"\x80\x7f"
    path.write_bytes(raw)
    plan, output = planned(folder), folder / "merged"
    bad = next(share for share in Share(1, 2).all() if any(job.name == name for job in share.of(plan.jobs)))
    for share in Share(1, 2).all():
        if share != bad:
            run_part(plan, share, output)
    with pytest.raises(NonFinite, match=name):
        run_part(plan, bad, output)
    with pytest.raises(RunError, match="missing"):
        finish(plan, output)
    assert run_part(plan, bad, output, allow_nonfinite=True).nonfinite == {name: 1}
    assert finish(plan, output).nonfinite == {name: 1}
    run(plan, folder / "single", allow_nonfinite=True)
    assert contents(output) == contents(folder / "single")


def test_a_failing_disk_makes_a_part_start_again_and_no_other(plan, single, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    run_part(plan, Share(1, 2), output)
    with monkeypatch.context() as patch:
        patch.setattr(system, "fsync", _full)
        with pytest.raises(RunError):
            run_part(plan, Share(2, 2), output)
    assert run_part(plan, Share(1, 2), output).resumed == len(Share(1, 2).of(plan.jobs))
    assert run_part(plan, Share(2, 2), output).resumed == 0
    finish(plan, output)
    assert contents(output) == single


def test_finish_does_not_trust_a_disk_that_did_not_keep_the_bytes(plan, single, tmp_path, monkeypatch):
    output = tmp_path / "merged"
    in_parts(plan, output, 2)
    with monkeypatch.context() as patch:
        patch.setattr(system, "fsync", _full)
        with pytest.raises(RunError, match="disk is full"):
            finish(plan, output)
    assert not output.exists()
    with pytest.raises(RunError):
        finish(plan, output)
    assert in_parts(plan, output, 2).resumed == 0
    finish(plan, output)
    assert contents(output) == single


@pytest.mark.parametrize("call", ["rename", "pwrite"])
def test_a_finish_that_fails_can_be_repeated(plan, single, tmp_path, monkeypatch, call):
    output = tmp_path / "merged"
    in_parts(plan, output, 2)
    true = getattr(system, call)
    for fails in range(1, 40):
        count = iter(range(1, 1000))
        with monkeypatch.context() as patch:
            patch.setattr(system, call, lambda *a, n=count, f=fails: _full() if next(n) == f else true(*a))
            try:
                finish(plan, output)
            except RunError:
                assert not output.exists()
                continue
            break
    assert fails > 3
    assert contents(output) == single


def test_parts_of_a_folder_that_is_not_ours_need_force(plan, single, tmp_path):
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputRefused, match="not a merge"):
        run_part(plan, Share(1, 1), output)
    run_part(plan, Share(1, 1), output, force=True)
    with pytest.raises(OutputRefused, match="not a merge"):
        finish(plan, output)
    assert contents(output) == {"thesis.txt": b"years of work"}
    finish(plan, output, force=True)
    assert contents(output) == single


def test_what_does_not_belong_is_not_published(plan, single, tmp_path):
    output = tmp_path / "merged"
    in_parts(plan, output, 2)
    (tmp_path / ".merged.partial" / "stray.txt").write_text("stray")
    finish(plan, output)
    assert contents(output) == single


def test_a_folder_copied_elsewhere_is_finished_there(plan, single, tmp_path):
    in_parts(plan, tmp_path / "merged", 2)
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / ".merged.partial", tmp_path / "there" / ".merged.partial")
    finish(plan, tmp_path / "there" / "merged")
    assert contents(tmp_path / "there" / "merged") == single
