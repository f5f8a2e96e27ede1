"""What every example makes on one device and on another, compared weight by weight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.kernels.rounding import widen
from mergetool.storage.header import read_header

from .work import ROOT

EXAMPLES = tuple(sorted((ROOT / "examples").glob("*.yaml")))
MEASURED = ("align-repair", "dam", "fisher", "regmean", "tact")
"""The examples whose weights depend on what networks give in float32, which differs in its last bits by device."""
CLOSE = 1e-3
"""How far these may be apart: the norm of the difference over that of the weights. Rounding to bfloat16 is 2e-3."""
LONGEST = 150
"""Seconds that an example may take."""
STEPS = 0
"""How many numbers of the dtype any other weight may be apart."""
TOGETHER = 12
"""Examples that are made at once."""


@dataclass(frozen=True)
class Agreement:
    """How two outputs differ."""

    weights: int
    unequal: int
    """Weights that are not the same number."""
    steps: int
    """How many numbers of its dtype lie between the two values of a weight, at most."""
    relative: float
    """The norm of the difference over that of the weights."""

    def within(self, example: str) -> bool:
        """Whether it is what may be expected of an example."""
        return self.relative <= CLOSE if example in MEASURED else self.steps <= STEPS


def merge(recipe: Path, output: Path, device: str, cache: Path) -> str:
    """Run a recipe on a device by one thread, nothing known from earlier runs; what went wrong, or nothing."""
    command = [sys.executable, "-X", "faulthandler", "-m", "mergetool.cli"]
    command += ["run", "--quiet", "--device", device, str(recipe), str(output)]
    own = {"MERGETOOL_CACHE": str(cache / device), "OMP_NUM_THREADS": "1"}  # several run side by side
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **own}
    )
    try:
        _, said = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # says where it is
        _, said = process.communicate()
    return f"{recipe.name} on {device} ended with {process.returncode}: {said[-3000:]}" if process.returncode else ""


def every(device: str) -> dict[str, dict[str, Any]]:
    """Compare what every example makes on the CPU and on another device; or what went wrong."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(TOGETHER) as pool:
        made = {}
        for recipe in sorted(EXAMPLES, key=lambda recipe: recipe.stem not in MEASURED):  # those that take longest first
            for number, where in enumerate(("cpu", device)):
                output = Path(folder, str(number), recipe.stem)
                output.parent.mkdir(exist_ok=True)
                going = pool.submit(merge, recipe, output, where, Path(folder, "cache", recipe.stem))
                made[recipe.stem, number] = output, going
        found: dict[str, dict[str, Any]] = {}
        for recipe in EXAMPLES:
            both = [made[recipe.stem, number] for number in range(2)]
            wrong = "\n".join(filter(None, (going.result() for _, going in both)))
            try:
                found[recipe.stem] = {"wrong": wrong} if wrong else asdict(compare(*(output for output, _ in both)))
            except ValueError as why:
                found[recipe.stem] = {"wrong": str(why)}
            print(recipe.stem.ljust(20), found[recipe.stem], flush=True)
        return found


def compare(one: Path, other: Path) -> Agreement:
    """Compare all weights of two outputs that have the same tensors.

    Raises:
        ValueError: they do not have the same tensors.
    """
    weights = unequal = steps = 0
    difference = norm = 0.0
    for (name, dtype, a), (other_name, other_dtype, b) in zip(_tensors(one), _tensors(other), strict=True):
        if (name, dtype, a.shape) != (other_name, other_dtype, b.shape):
            raise ValueError(f"{name} {dtype} {a.shape} is not {other_name} {other_dtype} {b.shape}")
        apart = np.abs(_ordered(a) - _ordered(b))
        wide = [widen(raw, dtype) for raw in (a, b)]
        weights, unequal = weights + a.size, unequal + int(np.count_nonzero(apart))
        steps = max(steps, int(apart.max(initial=0)))
        difference, norm = difference + float(np.sum((wide[0] - wide[1]) ** 2)), norm + float(np.sum(wide[0] ** 2))
    return Agreement(weights, unequal, steps, (difference / norm) ** 0.5 if norm else 0.0)


def _tensors(output: Path) -> Iterator[tuple[str, str, NDArray[np.generic]]]:
    """The name, dtype and raw numbers of every floating tensor of an output, of all its folders."""
    for path in sorted(output.rglob("*.safetensors")):
        header = read_header(path)
        for name, entry in sorted(header.entries.items()):
            if entry.dtype.name in ("F32", "BF16", "F16"):
                yield name, entry.dtype.name, np.fromfile(path, entry.dtype.storage, entry.size, offset=entry.start)


def _ordered(raw: NDArray[np.generic]) -> NDArray[np.int64]:
    """Whole numbers in the order of the values, neighbours one apart, both zeros the same."""
    bits = raw.view({2: np.int16, 4: np.int32}[raw.itemsize]).astype(np.int64)
    least = -(1 << (8 * raw.itemsize - 1))
    return np.where(bits < 0, least - bits, bits)
