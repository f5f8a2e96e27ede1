"""What goes wrong is told in full, without traceback, with its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from mergetool import plan
from mergetool.cli import failure
from mergetool.errors import CheckpointError, MergetoolError, PlanError, Problem, RecipeError, RunError


@pytest.fixture
def raising(monkeypatch, run):
    """Run a command whose work raises the error."""

    def call(error, *options):
        def fail(*arguments, **keywords):
            raise error

        monkeypatch.setattr(plan, "check", fail)
        return run(*options, "check", "merge.yaml")

    return call


@pytest.mark.parametrize(
    ("kind", "code"), [(RecipeError, 2), (CheckpointError, 3), (PlanError, 3), (RunError, 4), (MergetoolError, 1)]
)
def test_every_kind_has_its_exit_code(raising, kind, code):
    result = raising(kind("it is wrong", "merge.yaml:1:2", "mend it"))
    assert result.exit_code == code
    assert result.stderr == "error: merge.yaml:1:2: it is wrong\n    mend it\n"
    assert result.stdout == ""


def test_all_problems_are_told(raising):
    result = raising(RecipeError([Problem("one"), Problem("two")]))
    assert result.stderr == "error: one\nerror: two\n2 problems\n"


def test_problems_of_a_recipe_come_with_their_places(folder, run):
    text = (folder / "merge.yaml").read_text()
    (folder / "merge.yaml").write_text(text.replace("density", "densty").replace("merge_method", "merge_methd"))
    result = run("check", "merge.yaml")
    assert result.exit_code == 2
    assert "merge.yaml:1:1: unknown key `merge_methd`" in result.stderr
    assert "merge.yaml:9:3: `ties` has no parameter `densty`" in result.stderr


def test_a_missing_model_is_named(folder, run):
    result = run("check", "merge.yaml", "--set", "models.1.model=./bb")
    assert result.exit_code == 3
    assert "./bb" in result.stderr


def test_an_interruption_says_how_to_go_on(monkeypatch, run):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "check", interrupt)
    result = run("run", "merge.yaml", "out")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; the same command continues from here\n"
    assert run("check", "merge.yaml").stderr == "interrupted\n"


def test_a_mistake_of_ours_asks_for_a_report(raising):
    result = raising(ZeroDivisionError("division by zero"))
    assert result.exit_code == 70
    assert "please report it" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError(), RecipeError("wrong")])
def test_debug_prints_the_traceback(raising, error, monkeypatch):
    assert "Traceback" in raising(error, "--debug").stderr
    monkeypatch.setenv("MERGETOOL_DEBUG", "1")
    assert "Traceback" in raising(error).stderr


def test_a_reader_that_left_is_no_error(raising, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *arguments: None)
    result = raising(BrokenPipeError())
    assert (result.exit_code, result.stderr) == (failure.BROKEN_PIPE, "")


@pytest.mark.skipif(os.name != "posix", reason="pipes as in a shell")
def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "mergetool.cli", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("command", [("schema",), ("check", "merge.yaml")])  # more than a buffer, and less
def test_output_to_a_full_disk_is_told_and_has_its_own_code(folder, command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mergetool.cli", *command], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == failure.UNWRITTEN
    assert done.stderr == b"error: the output cannot be printed: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_output_and_messages_to_a_full_disk_have_the_same_code():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "mergetool.cli", "schema"], stdout=full, stderr=full, check=False)
    assert done.returncode == failure.UNWRITTEN


def test_a_failing_disk_that_is_not_the_output_is_a_mistake_of_ours(raising):
    assert raising(OSError(28, "No space left on device")).exit_code == failure.UNEXPECTED


def test_the_usage_is_explained_by_click(run):
    assert run("run").exit_code == 2
    assert run("plan", "merge.yaml", "--memory", "much").exit_code == 2
    assert "write 5GB, 512MiB" in run("plan", "merge.yaml", "--memory", "much").stderr
    assert "write cpu, cuda" in run("run", "merge.yaml", "--device", "gpu").stderr
    assert "did you mean `plan`?" in run("pln").stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal")
@pytest.mark.parametrize(("settings", "red"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_errors_are_red_on_a_terminal(settings, red):
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "mergetool.cli", "check", "absent.yaml"]
    process = subprocess.run(command, stderr=theirs, env={**os.environ, **settings}, check=False)
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert process.returncode == 2
    assert "absent.yaml" in said
    assert ("\x1b[31m" in said) is red


def test_errors_are_plain_elsewhere(raising):
    assert "\x1b" not in raising(RecipeError("wrong")).stderr


def test_a_kernel_cache_that_cannot_be_written_is_a_warning_in_one_line(folder):
    (folder / "file").write_text("no folder")
    environment = {**os.environ, "MERGETOOL_CACHE": str(folder / "file"), "PYTHONWARNINGS": ""}
    command = [sys.executable, "-m", "mergetool.cli", "run", "merge.yaml", "merged", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ")
    assert "machine code is not kept there: Not a directory" in done.stderr
    assert done.stderr.count("\n") == 1


def test_warnings_of_others_go_the_way_they_went(capsys, recwarn):
    with failure.warned():
        warnings.showwarning(UserWarning("ours"), UserWarning, failure.__file__, 1)
        warnings.showwarning(UserWarning("theirs"), UserWarning, "elsewhere.py", 7)
    assert [str(each.message) for each in recwarn] == ["theirs"]
    assert capsys.readouterr().err == "warning: ours\n"
