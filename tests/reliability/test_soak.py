"""Killed a hundred times at random moments, `mergetool run` gives the same bytes as when it is left alone."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from execute.conftest import contents, fingerprint
from plan.models import TIES, trio

from mergetool.execute.staging import JOURNAL, LOCK, aside_path

KILLS = 100
SEED = 20
HANGS = 120.0
"""Seconds after which a process hangs; an undisturbed one takes two."""
RECIPES = {
    "dense": f"{TIES}  scope: model\n",
    "sparse": f"{TIES}  scope: model\n".replace("density: 0.5", "density: 0.25"),
}
PHASES = ("read headers", "measure", "lay out", "merge", "journal", "sync", "publish", "give the name", "tidy up")
ANY = "any time"
"""No phase but a moment by the clock: while the interpreter starts, or between two calls."""


@dataclass
class Phases:
    """Tells by its calls what a run is doing."""

    output: Path
    laid: bool = False
    measured: bool = False
    synced: bool = False
    named: bool = False

    def of(self, call: str, path: str) -> str:
        """What the run does with this call."""
        name = Path(path).name
        staged = f".{self.output.name}.partial" in path
        if call == "rename" and path in (str(self.output), str(aside_path(self.output))):
            self.named = True
            return "give the name"
        if self.named:
            return "tidy up"
        if "/facts" in path:
            self.measured = True
            return "measure"
        if staged and name == JOURNAL:
            return "journal"
        if staged and name.endswith(".safetensors"):
            self.laid = True
            self.synced |= call == "fsync"
            kinds = {"fsync": "sync", "open_file": "lay out", "allocate": "lay out", "close": "sync"}
            return kinds.get(call, "merge" if self.measured else "lay out")
        if staged and (self.synced or name.endswith(".part")):
            return "publish"
        if not self.laid:
            return "read headers"
        return "merge" if self.measured else "measure"


@dataclass
class Run:
    """One process of `mergetool run`, read along with."""

    process: subprocess.Popen[bytes]
    calls: Iterator[str]
    phases: Phases
    seen: Counter[str] = field(default_factory=Counter)

    def until(self, phase: str, number: int) -> bool:
        """Read along until the n-th call of a phase; whether there was one."""
        for line in self.calls:
            now = self.phases.of(*line.rstrip("\n").split(" ", 1))
            self.seen[now] += 1
            if now == phase and self.seen[now] == number:
                return True
        return False

    def kill(self) -> bool:
        """Kill it; whether it was still there to be killed."""
        os.kill(self.process.pid, signal.SIGKILL)
        code = self.process.wait(60)
        assert code in (0, -signal.SIGKILL), self.process.stderr.read()
        return code != 0


@contextmanager
def running(recipe: Path, output: Path, *more: str) -> Iterator[Run]:
    """A process that merges slowly."""
    read, write = os.pipe()
    script = str(Path(__file__).with_name("slow_run.py"))
    options = ["--quiet", "--workers", "2", "--shard-size", "400", *more]
    command = [sys.executable, script, str(write), "run", str(recipe), str(output), *options]
    process = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.PIPE)
    os.close(write)
    watchdog = threading.Timer(HANGS, process.kill)
    watchdog.start()
    with process, os.fdopen(read) as calls:
        try:
            yield Run(process, calls, Phases(output))
        finally:
            watchdog.cancel()
            process.kill()


def written(recipe: Path, text: str, models: Path) -> Path:
    """A recipe's file, its models named by where they lie."""
    recipe.write_text(re.sub(r"(model: )(base|a|b)\b", rf"\g<1>{models}/\g<2>", text))
    return recipe


def complete(recipe: Path, output: Path) -> Counter[str]:
    """Run the same command to its end; how many calls each phase took."""
    with running(recipe, output, "--force") as run:
        assert not run.until("nothing", 0)
        assert run.process.wait(60) == 0, run.process.stderr.read()
    return run.seen


@pytest.mark.slow
def test_killed_a_hundred_times_at_random_moments_the_same_commands_give_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began, numbers = time.monotonic(), random.Random(SEED)
    models = trio(tmp_path / "models")
    sources = {name: fingerprint(models / name) for name in ("base", "a", "b")}
    recipes, expected = {}, {}
    for name, text in RECIPES.items():
        recipes[name] = written(tmp_path / f"{name}.yaml", text, models)
        usual = complete(recipes[name], tmp_path / name / "merged")
        expected[name] = contents(tmp_path / name / "merged")
    assert expected["dense"] != expected["sparse"]
    assert set(usual) == set(PHASES)

    output = tmp_path / "out" / "merged"
    output.parent.mkdir()
    kills: Counter[str] = Counter()
    starts = completions = longest = 0
    old: str | None = None
    while sum(kills.values()) < KILLS:
        now = "sparse" if old == "dense" else "dense"  # each replaces what the other made
        in_a_row = 0
        while True:
            starts += 1
            if sum(kills.values()) >= KILLS or numbers.random() < 0.25:
                complete(recipes[now], output)
                break
            phase = min((*PHASES, ANY), key=lambda phase: kills[phase] + 3 * numbers.random())
            with running(recipes[now], output, "--force") as run:
                if phase == ANY:
                    time.sleep(numbers.uniform(0, 1.5))
                elif run.until(phase, numbers.randint(1, usual[phase])):
                    time.sleep(numbers.uniform(0, 0.004))  # before, in and after the call
                if run.kill():
                    kills[phase] += 1
                    in_a_row += 1
            longest = max(longest, in_a_row)
            only_whole_folders(output, expected, old, now)
            assert {name: fingerprint(models / name) for name in sources} == sources
        completions += 1
        assert contents(output) == expected[now]
        assert [path.name for path in output.parent.iterdir()] == ["merged"]
        old = now
    with capsys.disabled():
        hit = ", ".join(f"{phase} {count}" for phase, count in kills.most_common())
        sys.stdout.write(
            f"\n{sum(kills.values())} kills ({hit}) in {starts} runs, at most {longest} in a row; "
            f"{completions} folders completed, every byte as undisturbed; {time.monotonic() - began:.0f} s\n"
        )
    assert set(kills) == {*PHASES, ANY}


def only_whole_folders(output: Path, expected: dict[str, dict[str, bytes]], old: str | None, now: str) -> None:
    """After a kill the output is the old folder or the new one, or stands aside between two renames."""
    left = contents(output if output.exists() else aside_path(output))
    if not left:
        assert old is None
        return
    whole = [expected[name] for name in (old, now) if name is not None]
    assert any(left.items() >= made.items() and left.keys() - made.keys() <= {JOURNAL, LOCK} for made in whole), left
