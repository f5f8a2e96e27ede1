"""Killed at random moments while models are matched, measured and trained, a run gives the bytes of one left alone."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from execute.conftest import Runner, contents
from execute.prepare_models import RECIPE, TRAIN, models

SEED, KILLS = 21, 30
ALIGN = "align: {method: activation_matching, reference: base, groups: [mlp, heads, vo]}\n"
RECIPES = {
    "match": RECIPE.replace("METHOD", "task_arithmetic") + ALIGN,
    "measure": RECIPE.replace("METHOD", "regmean").replace("parameters: {weight: 0.5}\n", ""),
    "gradients": RECIPE.replace("METHOD", "fisher").replace("parameters: {weight: 0.5}\n", ""),
    "train": RECIPE.replace("METHOD", "dam").replace("parameters: {weight: 0.5}\n", "")
    + TRAIN.replace("steps: 4", "steps: 12"),
    "turn and train": RECIPE.replace("METHOD", "dam").replace("parameters: {weight: 0.5}\n", "") + ALIGN + TRAIN,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models(tmp_path_factory.mktemp("home"))
    for name, text in RECIPES.items():
        (folder / f"{name.replace(' ', '-')}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def forking(home: Path) -> Iterator[Runner]:
    """A process that forks slow runs; its facts are in ``cache`` beside the models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGETOOL_CACHE", str(home / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")  # threads of a parallel region do not outlive a fork
        started = Runner(home / "train.yaml", home / "warm")
    yield started
    started.stop()


def killed(runner: Runner, recipe: Path, output: Path, writes: int, pause: float) -> bool:
    """Begin a run and kill it after so many writes and a pause; False where it had come to its end."""
    child = runner.start(recipe, output)
    for _ in range(writes):
        if runner.process.stdout.readline() != "write\n":
            assert runner.process.stdout.readline() == "ended\n"
            return False
    time.sleep(pause)
    return runner.kill(child, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_facts_that_were_killed_are_gone_on_with(
    home: Path, forking: Runner, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, output, facts = home / f"{name.replace(' ', '-')}.yaml", home / "merged", home / "cache" / "facts"
    numbers = random.Random(f"{SEED} {name}")

    def anew() -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(facts, ignore_errors=True)

    anew()
    forking.start(recipe, output)
    usual = forking.writes()
    expected, made = contents(output), contents(facts)
    assert made
    kills = completions = most = 0
    while kills < KILLS:
        anew()
        in_a_row = 0
        while numbers.random() < 0.75 and killed(
            forking, recipe, output, numbers.randint(1, max(2, usual - 4)), numbers.choice((0, 0.01, 0.1))
        ):
            in_a_row += 1
        kills, most = kills + in_a_row, max(most, in_a_row)
        forking.start(recipe, output)
        forking.writes()
        completions += 1
        assert contents(output) == expected
        assert contents(facts) == made
    with capsys.disabled():
        sys.stdout.write(
            f"\n{name}: {kills} kills, at most {most} in a row, over {usual} writes; "
            f"{completions} folders completed, every byte of facts and model as undisturbed\n"
        )
