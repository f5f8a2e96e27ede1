"""The work that is measured: recipes over a base and two fine-tunes, everybody's command for them, what a run costs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .checkpoints import make
from .measure import chill, evict, remove, run, settle, warm

RECIPES: Mapping[str, Mapping[str, object]] = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "ties": {"weight": 0.5, "density": 0.3},
    "ties scope model": {"weight": 0.5, "density": 0.3, "scope": "model"},
}
"""The parameters of each piece of work, by name; the first word is the method."""
COMPARATOR = {"ties scope model": "ties"}
"""Where mergekit lacks a piece of work, what it has that comes nearest."""
ROOT = Path(__file__).parent.parent.parent
Costs = dict[str, list[dict[str, float]]]
"""The cost of every run of a piece of work, by who did it or how."""


@dataclass(frozen=True)
class Bench:
    """What was asked for on the command line."""

    folder: Path
    """Where checkpoints and outputs are made."""
    size: str = "1.1b"
    methods: Sequence[str] = tuple(RECIPES)
    repeats: int = 3
    mergekit_repeats: int = 1
    mergekit: str | None = None
    """The command, if it is measured too."""
    cold: bool = False

    def models(self, size: str | None = None) -> list[Path]:
        """A base and two fine-tunes of a size, made unless they are there."""
        size = size or self.size
        return [make(self.folder / f"{size}-{variant}", size, variant) for variant in range(3)]


@dataclass(frozen=True)
class Work:
    """A recipe applied to three models: the base, then its fine-tunes."""

    name: str
    models: Sequence[Path]
    folder: Path

    @property
    def variants(self) -> Sequence[int]:
        """Which of the models are merged."""
        return {"linear": (1, 2), "slerp": (0, 1)}.get(self.name.split()[0], (0, 1, 2))

    @property
    def sources(self) -> list[Path]:
        """The weight files that are read."""
        return [self.models[variant] / "model.safetensors" for variant in self.variants]

    @property
    def recipe(self) -> str:
        """The recipe; JSON is YAML."""
        base, *listed = (str(self.models[variant]) for variant in self.variants)
        content: dict[str, object] = {"merge_method": self.name.split()[0], "dtype": "bfloat16"}
        if self.variants[0] == 0:
            content["base_model"] = base
        if len(self.variants) == 2:
            listed = [base, *listed]
        content["models"] = [{"model": model} for model in listed]
        return json.dumps({**content, "parameters": RECIPES[self.name]}, indent=1)

    def command(self, who: str, *options: str, mergekit: str | None = None) -> list[str]:
        """Somebody's command for the work: that of mergetool, of the floor or of mergekit."""
        output = str(self._output)
        if who == "floor":
            return [sys.executable, "-m", f"{__package__}.floor", output, *map(str, self.sources)]
        path = self.folder / f"{self.name.replace(' ', '-')}.yaml"
        path.write_text(self.recipe)
        if who == "mergekit":
            assert mergekit is not None
            return [mergekit, str(path), output, "--quiet"]
        return [sys.executable, "-m", "mergetool.cli", "run", "--json", "--quiet", *options, str(path), output]

    @property
    def _output(self) -> Path:
        return self.folder / "out"

    def cost(self, who: str, *options: str, mergekit: str | None = None, state: str = "warm") -> dict[str, float]:
        """Run somebody's command and measure it; its output does not stay.

        Args:
            who: mergetool, floor or mergekit.
            options: further options of mergetool's command.
            mergekit: its command.
            state: what is in the page cache: ``warm`` all sources, ``evicted`` no source, ``cold`` nothing if that
                is allowed.
        """
        settle(self._output)
        {"warm": warm, "evicted": evict, "cold": chill}[state](self.sources)
        ours = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        theirs = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        command = self.command(who, *options, mergekit=mergekit)
        found = run(command, theirs if who == "mergekit" else ours)
        remove(self._output)
        numbers = found.numbers()
        if who == "mergetool":
            report = json.loads(found.output)
            numbers["engine_s"] = report["seconds"]
            numbers["source_read_MB"] = report["bytes_read"] / 1e6
        elif who == "floor":
            numbers["engine_s"] = float(found.output)
            numbers["source_read_MB"] = sum(source.stat().st_size for source in self.sources) / 1e6
        return numbers


def compile_kernels(bench: Bench, names: Sequence[str]) -> None:
    """Merge once on tiny models, so that no run that is measured compiles a kernel."""
    models = tuple(bench.models("tiny"))
    for name in names:
        _compiled(Work(name, models, bench.folder))


@cache
def _compiled(work: Work) -> None:
    work.cost("mergetool")


def rotated(contestants: Sequence[str], repeat: int) -> Iterator[str]:
    """The contestants in an order that begins with another one each time: who runs first may pay for all."""
    first = repeat % len(contestants)
    yield from (*contestants[first:], *contestants[:first])


def tell(*words: object) -> None:
    """Say on the terminal what was found; the last word is a cost."""
    *names, cost = words
    assert isinstance(cost, dict)
    shown = ("wall_s", "engine_s", "user_s", "system_s", "anonymous_MB")
    told = "  ".join(f"{key} {cost[key]:.3g}" for key in shown if key in cost)
    print(" · ".join(map(str, names)).ljust(40), told, flush=True)
