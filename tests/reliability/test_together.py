"""Runs to the same output at once: one makes it, the others are refused, and nobody's files are lost."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from execute.conftest import contents
from plan.models import TIES, planned, trio

from mergetool.errors import OutputRefused
from mergetool.execute import run
from mergetool.execute.progress import Quiet

from .test_soak import RECIPES, running, written

OTHER = TIES.replace("density: 0.5", "density: 0.25")
REFUSED = OutputRefused.exit_code


class Meanwhile(Quiet):
    """Does something while a run merges."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed = deed

    def start(self, *_: object) -> None:
        self.deed()


@pytest.mark.parametrize("what", ["files", "another merge"])
def test_what_somebody_puts_under_the_outputs_name_during_a_run_is_not_replaced(tmp_path: Path, what: str) -> None:
    trio(tmp_path)
    output, theirs = tmp_path / "merged", tmp_path / "theirs"
    if what == "files":
        theirs.mkdir()
        (theirs / "thesis.txt").write_text("years of work")
    else:
        run(planned(tmp_path, OTHER), theirs)
    plan = planned(tmp_path)
    with pytest.raises(OutputRefused, match="exists already"):
        run(plan, output, progress=Meanwhile(lambda: shutil.copytree(theirs, output)))
    assert contents(output) == contents(theirs)
    run(plan, tmp_path / "fresh")
    assert run(plan, output, force=True).resumed == len(plan.jobs)
    assert contents(output) == contents(tmp_path / "fresh")


def test_an_empty_folder_made_under_the_outputs_name_during_a_run_is_filled(tmp_path: Path) -> None:
    trio(tmp_path)
    run(planned(tmp_path), tmp_path / "merged", progress=Meanwhile(lambda: (tmp_path / "merged").mkdir(exist_ok=True)))
    assert "provenance.json" in contents(tmp_path / "merged")


def test_started_at_once_one_of_three_makes_the_folder_and_the_others_are_refused(tmp_path: Path) -> None:
    models, output = trio(tmp_path / "models"), tmp_path / "out" / "merged"
    recipe = written(tmp_path / "merge.yaml", RECIPES["dense"], models)
    run(planned(models, RECIPES["dense"], shard_size=400), tmp_path / "undisturbed")
    with ExitStack() as stack:
        runs = [stack.enter_context(running(recipe, output)) for _ in range(3)]
        codes = [one.process.wait(120) for one in runs]
        told = [one.process.stderr.read().decode() for one in runs]
    assert set(codes) <= {0, REFUSED}, told
    assert 0 in codes
    assert all("another run" in text or "cannot be written" in text for text, code in zip(told, codes) if code)
    # The recipes lie in different folders, and only the private record may tell.
    same = {
        name: content for name, content in contents(tmp_path / "undisturbed").items() if name.endswith(".safetensors")
    }
    assert contents(output).items() >= same.items()
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


@pytest.mark.slow
def test_a_second_run_that_starts_at_any_moment_of_the_first_harms_nothing(tmp_path: Path) -> None:
    models, numbers = trio(tmp_path / "models"), random.Random(7)
    recipe = written(tmp_path / "merge.yaml", RECIPES["dense"], models)
    expected = None
    for number in range(20):
        output = tmp_path / f"out{number}" / "merged"
        with running(recipe, output) as first:
            # The second takes a while to come to the point; the moments around the end matter most.
            time.sleep(numbers.uniform(0, 2))
            with running(recipe, output, *(["--force"] if numbers.random() < 0.5 else [])) as second:
                codes = first.process.wait(120), second.process.wait(120)
                told = first.process.stderr.read() + second.process.stderr.read()
        assert set(codes) <= {0, REFUSED}, told.decode()
        assert 0 in codes
        expected = expected or contents(output)
        assert contents(output) == expected
        assert [path.name for path in output.parent.iterdir()] == ["merged"]
