"""A run that was interrupted at any moment continues where it stopped and gives the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
from plan.models import TIES, planned

from execute.conftest import contents, fingerprint
from mergetool.errors import RunError
from mergetool.execute import batch, measure, run, staging
from mergetool.execute.staging import JOURNAL, LOCK
from mergetool.storage import system

MODEL_SCOPE = f"{TIES}  scope: model\n"


@pytest.fixture(scope="module")
def plan(shared):
    return planned(shared, MODEL_SCOPE, shard_size=1000)


@pytest.fixture(scope="module")
def undisturbed(plan, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "merged"
    run(plan, output)
    return contents(output)


@pytest.fixture(scope="module")
def half(plan, tmp_path_factory):
    """The working folder of a run that stopped at the very end, when every tensor was written."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[run.__module__], "publish", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(plan, folder / "merged")
    return folder / ".merged.partial"


def _killed(*_):
    raise KeyboardInterrupt


def again(half, tmp_path):
    """A copy of what the stopped run left, and the output that a new run would make of it."""
    return Path(shutil.copytree(half, tmp_path / ".merged.partial")), tmp_path / "merged"


def test_a_run_that_was_stopped_at_the_end_makes_no_tensor_again(plan, undisturbed, half, tmp_path):
    _, output = again(half, tmp_path)
    assert run(plan, output).resumed == len(plan.jobs)
    assert contents(output) == undisturbed


SIZE_OF_JOURNAL = 1100
CUTS = sorted({0, 1, *range(60, 100, 6), *random.Random(0).sample(range(SIZE_OF_JOURNAL), 40)})


@pytest.mark.parametrize("cut", CUTS)
def test_a_journal_cut_at_any_byte_is_continued(plan, undisturbed, half, tmp_path, cut):
    stage, output = again(half, tmp_path)
    journal = stage / JOURNAL
    whole = journal.read_bytes()
    assert len(whole) >= SIZE_OF_JOURNAL
    journal.write_bytes(whole[:cut])
    report = run(plan, output)
    assert report.resumed == max(0, whole[:cut].count(b"\n") - 1)
    assert contents(output) == undisturbed


@pytest.mark.parametrize("place", random.Random(1).sample(range(SIZE_OF_JOURNAL), 20))
def test_a_journal_with_a_damaged_byte_never_gives_other_bytes(plan, undisturbed, half, tmp_path, place):
    stage, output = again(half, tmp_path)
    journal = bytearray((stage / JOURNAL).read_bytes())
    journal[place] ^= 4
    (stage / JOURNAL).write_bytes(journal)
    run(plan, output)
    assert contents(output) == undisturbed


def test_a_flipped_byte_in_any_tensor_is_found_and_that_tensor_made_again(plan, undisturbed, half, tmp_path):
    for number, job in enumerate(plan.jobs):
        stage, output = again(half, tmp_path / str(number))
        shard = next(shard for shard in plan.shards if job.name in shard.header.entries)
        entry = shard.header.entries[job.name]
        raw = bytearray((stage / shard.file).read_bytes())
        raw[random.Random(number).randrange(entry.start, entry.stop)] ^= 1
        (stage / shard.file).write_bytes(raw)
        assert run(plan, output).resumed == len(plan.jobs) - 1
        assert contents(output) == undisturbed


@pytest.mark.parametrize("harm", ["removed", "cut short", "header", "replaced by a link"])
def test_a_shard_that_is_gone_or_spoilt_is_made_again(plan, undisturbed, half, tmp_path, harm):
    stage, output = again(half, tmp_path)
    shard = plan.shards[1]
    path = stage / shard.file
    raw = path.read_bytes()
    if harm == "cut short":
        path.write_bytes(raw[:-1])
    elif harm == "header":
        path.write_bytes(raw[:9] + b"x" + raw[10:])
    else:
        path.unlink()
    if harm == "replaced by a link":
        (tmp_path / "mine").write_bytes(raw)
        path.symlink_to(tmp_path / "mine")
    assert run(plan, output).resumed == len(plan.jobs) - len(shard.header.entries)
    assert contents(output) == undisturbed
    assert not (output / shard.file).is_symlink()


def test_files_that_do_not_belong_are_not_published(plan, undisturbed, half, tmp_path):
    stage, output = again(half, tmp_path)
    (stage / JOURNAL).write_bytes(b"")
    (stage / "stray.txt").write_text("stray")
    run(plan, output)
    assert contents(output) == undisturbed


def test_facts_that_were_measured_are_not_measured_again(plan, undisturbed, half, tmp_path, monkeypatch):
    stage, output = again(half, tmp_path)
    assert [path.name for path in (stage / measure.FOLDER).iterdir()] == ["ties.cut.safetensors"]
    lines = (stage / JOURNAL).read_bytes().splitlines(keepends=True)
    (stage / JOURNAL).write_bytes(b"".join(lines[:3]))
    monkeypatch.setattr(measure, "cuts", None)
    assert run(plan, output).resumed == 2
    assert contents(output) == undisturbed


def test_facts_that_are_damaged_are_measured_again(plan, undisturbed, half, tmp_path):
    size = (half / measure.FOLDER / "ties.cut.safetensors").stat().st_size
    for place in (0, 8, 20, size - 16, size - 1, None):
        stage, output = again(half, tmp_path / str(place))
        path = stage / measure.FOLDER / "ties.cut.safetensors"
        raw = bytearray(path.read_bytes())
        if place is None:
            del raw[-1:]
        else:
            raw[place] ^= 1
        path.write_bytes(raw)
        lines = (stage / JOURNAL).read_bytes().splitlines(keepends=True)
        (stage / JOURNAL).write_bytes(b"".join(lines[:3]))
        run(plan, output)
        assert contents(output) == undisturbed


def test_an_interrupt_by_the_keyboard_keeps_what_is_done(plan, undisturbed, tmp_path, monkeypatch):
    true, calls = system.pwrite, []

    def pwrite(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "BATCH_BYTES", 1)
        patch.setattr(system, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert run(plan, tmp_path / "merged").resumed >= 1
    assert contents(tmp_path / "merged") == undisturbed


def test_the_facts_and_the_journal_are_not_part_of_the_model(undisturbed):
    hidden = {name for name in undisturbed if name.startswith((".", measure.FOLDER))}
    assert hidden == {".mergetool/.gitignore", ".mergetool/local.json"}


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_between_its_name_and_the_end_the_next_run_tidies_up(plan, undisturbed, tmp_path, monkeypatch, earlier):
    output = tmp_path / "merged"
    if earlier:
        output.mkdir()
        (output / "earlier.txt").write_text("replaced")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_sweep", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(plan, output, force=True)
    left = contents(output)
    assert left.keys() - undisturbed.keys() == {JOURNAL, LOCK}
    assert left.items() >= undisturbed.items()
    assert run(plan, output).unchanged
    assert contents(output) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_killed_at_any_moment_the_same_command_completes_the_same_folder(folder, runner):
    (folder / "merge.yaml").write_text(MODEL_SCOPE)
    recipe = folder / "merge.yaml"
    sources = {name: fingerprint(folder / name) for name in ("base", "a", "b")}
    runner.start(recipe, folder / "undisturbed")
    total = runner.writes()
    expected = contents(folder / "undisturbed")
    assert total > 30
    moments = sorted(random.Random(2).sample(range(1, total + 1), 10))
    for moment in moments:
        output = folder / f"merged{moment}"
        child = runner.start(recipe, output)
        assert runner.wait_for(moment)
        assert runner.kill(child, signal.SIGKILL) or moment == total
        assert not output.exists() or contents(output).items() >= expected.items()
        run(planned(folder, MODEL_SCOPE, workers=2), output)
        assert contents(output) == expected, moment
    assert {name: fingerprint(folder / name) for name in ("base", "a", "b")} == sources


def test_killed_over_and_over_one_folder_is_completed_in_the_end(folder, runner):
    recipe, output = folder / "merge.yaml", folder / "merged"
    recipe.write_text(MODEL_SCOPE)
    chosen = random.Random(3)
    for _ in range(8):
        child = runner.start(recipe, output)
        assert runner.wait_for(chosen.randrange(2, 8))
        runner.kill(child, signal.SIGKILL)
        assert not output.exists()
    run(planned(folder, MODEL_SCOPE), output)
    run(planned(folder, MODEL_SCOPE), folder / "undisturbed")
    assert contents(output) == contents(folder / "undisturbed")


def test_an_error_of_one_worker_is_told_and_not_that_others_gave_up(plan, tmp_path, monkeypatch):
    true, calls = system.preadv, []

    def preadv(*arguments):
        calls.append(1)
        if len(calls) > 20:
            raise OSError(5, "Input/output error")
        return true(*arguments)

    monkeypatch.setattr(system, "preadv", preadv)
    with pytest.raises(RunError, match="check the disk"):
        run(plan, tmp_path / "merged")
