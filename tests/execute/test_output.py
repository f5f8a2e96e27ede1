"""An output never takes the place of a source or of somebody's files, and one run at a time makes it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal

import pytest
from plan.models import TIES, planned

from execute.conftest import contents, fingerprint, tensors
from mergetool.errors import OutputRefused, RunError
from mergetool.execute import run
from mergetool.execute.parts import finish, run_part
from mergetool.plan.parts import Share
from mergetool.storage import system
from mergetool.storage.header import read_header

OTHER = TIES.replace("density: 0.5", "density: 0.25")


def untouched(folder):
    return {name: fingerprint(folder / name) for name in ("base", "a", "b")}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", ["a", "base", "a/merged", "a/deep/er", ".", "../{name}", "a/../b", "a/"])
def test_a_source_is_never_replaced_nor_written_into(folder, force, place):
    before = untouched(folder)
    with pytest.raises(OutputRefused, match="is where the source"):
        run(planned(folder), folder / place.format(name=folder.name), force=force)
    assert untouched(folder) == before
    assert {path.name for path in folder.iterdir()} == {"base", "a", "b", "merge.yaml"}


@pytest.mark.parametrize("force", [False, True])
def test_a_link_to_a_source_is_a_source(folder, tmp_path_factory, force):
    before = untouched(folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "link").symlink_to(folder / "a")
    (elsewhere / "around").symlink_to(folder)
    for place in ("link", "around/b", "link/merged"):
        with pytest.raises(OutputRefused):
            run(planned(folder), elsewhere / place, force=force)
    assert untouched(folder) == before


@pytest.mark.parametrize("kept", [".merged.partial", ".merged.replaced"])
def test_a_source_that_lies_where_a_run_works_is_not_swept_away(folder, kept):
    shutil.copytree(folder / "a", folder / kept)
    before = fingerprint(folder / kept)
    with pytest.raises(OutputRefused, match="is where the source"):
        run(planned(folder, TIES.replace("model: a", f"model: {kept}")), folder / "merged")
    assert fingerprint(folder / kept) == before


def test_a_link_where_a_run_works_is_not_followed(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years of work")
    (folder / ".merged.partial").symlink_to(folder / "mine")
    with pytest.raises(OutputRefused, match="is a link"):
        run(planned(folder), folder / "merged")
    assert (folder / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_link_is_not_replaced(folder, force):
    (folder / "file").write_text("mine")
    (folder / "target").mkdir()
    (folder / "link").symlink_to(folder / "target")
    (folder / "broken").symlink_to(folder / "nowhere")
    for place, words in (("file", "no folder"), ("link", "is a link"), ("broken", "is a link")):
        with pytest.raises(OutputRefused, match=words):
            run(planned(folder), folder / place, force=force)
    assert (folder / "file").read_text() == "mine"
    assert list((folder / "target").iterdir()) == []
    assert (folder / "link").is_symlink()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", ["/", "//", "/..", "/."])
def test_the_root_of_the_file_system_is_refused(folder, force, place):
    with pytest.raises(OutputRefused, match="no folder that could be made"):
        run(planned(folder), place, force=force)


def test_no_output_at_all_is_refused(folder):
    with pytest.raises(OutputRefused, match="no output"):
        run(planned(folder))


def test_the_recipes_output_lies_beside_the_recipe(folder):
    report = run(planned(folder, f"{TIES}output: made/here\n"))
    assert report.output == folder / "made" / "here"
    assert tensors(folder / "made" / "here").keys() == tensors(folder / "base").keys()


def test_an_empty_folder_is_filled(folder):
    (folder / "merged").mkdir()
    run(planned(folder), folder / "merged")
    assert "provenance.json" in contents(folder / "merged")


def test_the_current_folder_can_be_the_output(folder, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    plan = planned(folder)
    run(plan, ".")
    assert "model.safetensors" in contents(here)


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "provenance.json", "sub/notes.txt"])
def test_somebodys_files_stay_unless_force_is_given(folder, name):
    mine = folder / "merged" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    with pytest.raises(OutputRefused, match="not a merge") as refused:
        run(planned(folder), folder / "merged")
    assert "--force" in refused.value.problems[0].fix
    assert contents(folder / "merged") == {name: b"{}"}
    run(planned(folder), folder / "merged", force=True)
    run(planned(folder), folder / "fresh")
    assert contents(folder / "merged") == contents(folder / "fresh")


def test_the_same_merge_again_has_nothing_to_do(folder):
    first = run(planned(folder), folder / "merged")
    before = fingerprint(folder / "merged")
    again = run(planned(folder), folder / "merged")
    assert (first.unchanged, again.unchanged) == (False, True)
    assert (again.digests, again.notes) == (first.digests, first.notes)
    assert fingerprint(folder / "merged") == before


@pytest.mark.parametrize("harm", ["removed", "cut short"])
def test_the_same_merge_again_makes_a_lost_file_again(folder, harm):
    plan = planned(folder, shard_size=1000)
    run(plan, folder / "merged")
    before = contents(folder / "merged")
    path = folder / "merged" / plan.shards[-1].file
    if harm == "removed":
        path.unlink()
    else:
        os.truncate(path, 100)
    assert not run(plan, folder / "merged").unchanged
    assert contents(folder / "merged") == before


def test_the_same_recipe_with_new_sources_replaces_its_own_output(folder):
    run(planned(folder), folder / "merged")
    stale = folder / "merged" / "stale.txt"
    stale.write_text("left by an earlier version")
    os.utime(folder / "a" / "model.safetensors", ns=(1, 1))
    assert not run(planned(folder), folder / "merged").unchanged
    assert not stale.exists()


def test_another_recipe_replaces_a_merge_only_by_force(folder):
    run(planned(folder), folder / "merged")
    before = fingerprint(folder / "merged")
    with pytest.raises(OutputRefused, match="another recipe"):
        run(planned(folder, OTHER), folder / "merged")
    assert fingerprint(folder / "merged") == before
    run(planned(folder, OTHER), folder / "merged", force=True)
    run(planned(folder, OTHER), folder / "fresh")
    assert contents(folder / "merged") == contents(folder / "fresh")
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


def test_a_merge_without_its_private_record_is_replaced_only_by_the_same_plan(folder):
    plan = planned(folder)
    run(plan, folder / "merged")
    before = contents(folder / "merged")
    shutil.rmtree(folder / "merged" / ".mergetool")
    (folder / "merged" / plan.shards[0].file).unlink()
    with pytest.raises(OutputRefused, match="another recipe"):
        run(planned(folder, OTHER), folder / "merged")
    assert not run(planned(folder), folder / "merged").unchanged
    assert contents(folder / "merged") == before


def test_a_recipe_that_differs_only_in_where_a_source_lies_is_another(folder):
    shutil.copytree(folder / "a", folder / "elsewhere" / "a")
    run(planned(folder), folder / "merged")
    other = planned(folder, TIES.replace("model: a\n", "model: elsewhere/a\n"))
    assert other.sources != planned(folder).sources
    for record in ("there", "gone"):
        if record == "gone":
            shutil.rmtree(folder / "merged" / ".mergetool")
        with pytest.raises(OutputRefused, match="another recipe"):
            run(other, folder / "merged")


def test_what_another_plan_left_half_done_is_not_taken_over(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", _full)
        with pytest.raises(RunError):
            run(planned(folder, OTHER), folder / "merged")
    assert (folder / ".merged.partial" / "model.safetensors").exists()
    assert run(planned(folder), folder / "merged").resumed == 0
    run(planned(folder), folder / "fresh")
    assert contents(folder / "merged") == contents(folder / "fresh")


def _trained_on(folder):
    """A source as it is after another step: of the same size, time and layout."""
    path = folder / "a" / "model.safetensors"
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    entry = read_header(path).entries["model.norm.weight"]
    raw[entry.start : entry.stop] = raw[entry.start : entry.stop][::-1]
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_source_of_the_same_size_time_and_layout_is_another(folder):
    run(planned(folder), folder / "merged")
    before = planned(folder).digest
    _trained_on(folder)
    assert planned(folder).digest == before, "planning looks at no weights"
    assert not run(planned(folder), folder / "merged").unchanged
    run(planned(folder), folder / "fresh")
    assert contents(folder / "merged") == contents(folder / "fresh")


def test_what_was_begun_with_a_source_of_the_same_size_time_and_layout_is_not_taken_over(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", _full)
        with pytest.raises(RunError):
            run(planned(folder), folder / "merged")
    run_part(planned(folder), Share(1, 2), folder / "parts")
    _trained_on(folder)
    assert run(planned(folder), folder / "merged").resumed == 0
    run(planned(folder), folder / "fresh")
    assert contents(folder / "merged") == contents(folder / "fresh")
    for go_on in (
        lambda: run_part(planned(folder), Share(2, 2), folder / "parts"),
        lambda: finish(planned(folder), folder / "parts"),
    ):
        with pytest.raises(OutputRefused, match="other sources"):
            go_on()


@pytest.mark.parametrize("failing", [1, 2])
def test_what_an_output_replaces_is_there_until_the_new_one_is(folder, monkeypatch, failing):
    run(planned(folder), folder / "merged")
    before = contents(folder / "merged")
    plan = planned(folder, OTHER)
    true, calls = system.rename, []

    def rename(source, target):
        if "merged" in os.fspath(target) and os.fspath(source).endswith(("merged", ".partial")):
            calls.append(target)
            if len(calls) == failing:
                _full()
        true(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", rename)
        with pytest.raises(RunError):
            run(plan, folder / "merged", force=True)
    assert contents(folder / "merged") == before
    assert run(plan, folder / "merged", force=True).resumed == len(plan.jobs)
    run(plan, folder / "fresh")
    assert contents(folder / "merged") == contents(folder / "fresh")


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_second_run_is_refused_while_the_first_holds_the_output_and_not_after_it_died(folder, runner):
    plan = planned(folder)
    first = runner.start(folder / "merge.yaml", folder / "merged")
    runner.wait_for(3)
    for force in (False, True):
        with pytest.raises(OutputRefused, match="another run"):
            run(plan, folder / "merged", force=force)
    run(plan, folder / "other")  # another output is nobody's business
    runner.kill(first, signal.SIGKILL)
    run(plan, folder / "merged")
    assert contents(folder / "merged") == contents(folder / "other")


def test_a_run_that_waited_for_the_lock_of_a_finished_one_does_not_work_in_its_folder(folder, monkeypatch):
    plan = planned(folder)
    true, once = fcntl.flock, []

    def flock(*arguments):
        if not once:  # between opening the lock and taking it, another run finishes
            once.append(True)
            run(plan, folder / "merged")
        return true(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputRefused, match="another run"):
        run(plan, folder / "merged")
    monkeypatch.undo()
    assert run(plan, folder / "merged").unchanged
