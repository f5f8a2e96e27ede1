"""``run --part`` and ``finish``: what they print, and the exit codes that a batch system sees."""

from __future__ import annotations

import json

import pytest


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_and_finish_make_the_folder_of_a_run(folder, run):
    first = run("run", "merge.yaml", "out", "--part", "1/3")
    assert first.exit_code == 0, first.stderr
    assert first.stdout.startswith("part 1/3 of out\n")
    assert first.stdout.endswith("still missing: 2 parts, 2/3, 3/3\n")
    assert not (folder / "out").exists()
    assert run("run", "merge.yaml", "out", "--part", "3/3").stdout.endswith("still missing: 1 part, 2/3\n")
    assert "mergetool finish merge.yaml out" in run("run", "merge.yaml", "out", "--part", "2/3").stdout
    finished = run("finish", "merge.yaml", "out")
    assert finished.exit_code == 0, finished.stderr
    assert "checked  9 tensors, 7.78 kB" in finished.stdout
    run("run", "merge.yaml", "other")
    assert files(folder / "out") == files(folder / "other")
    assert "nothing was done" in run("finish", "merge.yaml", "out").stdout
    assert "nothing was done" in run("run", "merge.yaml", "out", "--part", "1/3").stdout


def test_finish_without_all_parts_exits_with_4_and_names_them(folder, run):
    run("run", "merge.yaml", "out", "--part", "1/2")
    failed = run("finish", "merge.yaml", "out")
    assert failed.exit_code == 4
    assert "part 2/2 was not run" in failed.stderr
    assert "--part 2/2" in failed.stderr
    assert failed.stdout == ""


def test_other_settings_than_those_of_the_parts_are_refused(folder, run):
    run("run", "merge.yaml", "out", "--part", "1/2", "--shard-size", "1KB")
    for arguments in (("finish", "merge.yaml", "out"), ("run", "merge.yaml", "out", "--part", "2/2")):
        refused = run(*arguments)
        assert refused.exit_code == 4
        assert "another shard size" in refused.stderr
    assert run("run", "merge.yaml", "out", "--part", "2/2", "--shard-size", "1KB").exit_code == 0
    assert run("finish", "merge.yaml", "out", "--shard-size", "1KB", "--quiet").stdout == ""


@pytest.mark.parametrize("part", ["0/8", "9/8", "8", "a/b", "1/0", "-1/8", "1/8/2", "", "١/8"])
def test_what_is_no_part_is_refused_before_anything_is_read(run, part):
    refused = run("run", "nowhere.yaml", "out", f"--part={part}")
    assert refused.exit_code == 2
    assert "write 1/8 for the first of eight" in refused.stderr


def test_both_report_json_alone_on_stdout(folder, run):
    part = json.loads(run("run", "merge.yaml", "out", "--part", "1/2", "--json").stdout)
    assert (part["part"], part["parts"], part["missing"]) == (1, 2, [2])
    other = json.loads(run("run", "merge.yaml", "out", "--part", "2/2", "--json").stdout)
    assert other["missing"] == []
    whole = json.loads(run("finish", "merge.yaml", "out", "--json").stdout)
    assert whole["digests"] == part["digests"] | other["digests"]


def test_finish_without_an_output_says_what_to_do(folder, run):
    result = run("finish", "merge.yaml")
    assert result.exit_code == 2
    assert "add `output: …`" in result.stderr
