"""The 8×8 handwritten digits of scikit-learn's wheel, and the tasks that are made of them.

scikit-learn is not needed: the file is taken out of the installed package if there is one, and otherwise out of the
wheel, which pip downloads and does not install. It is kept in `$MERGETOOL_TEST_CACHE/digits`, by default
`~/.cache/mergetool/tests/digits`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

WHEEL = "scikit-learn==1.7.2"
INSIDE = "sklearn/datasets/data/digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
TEST = 500
SECONDS = 300


class UnavailableError(Exception):
    """The digits are not there and cannot be fetched; the message says what to do."""


@dataclass(frozen=True)
class Data:
    """Images [n, 64], pixels from 0 to 1, and their labels [n]."""

    x: torch.Tensor
    y: torch.Tensor

    def some(self, samples: int) -> Data:
        """The first `samples` of them."""
        return Data(self.x[:samples], self.y[:samples])

    def __add__(self, other: Data) -> Data:
        return Data(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


@dataclass(frozen=True)
class Task:
    """What a network learns: the images of a split, changed in one way, and perhaps under other labels."""

    name: str
    train: Data
    test: Data


Change = Callable[[torch.Tensor], torch.Tensor]


def _noisy(images: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(images))
    return (images + 0.3 * torch.randn(images.shape, generator=draw)).clamp(0, 1)


# Images are [n, 8, 8].
CHANGES: dict[str, Change] = {
    "plain": lambda images: images,
    "rotated": lambda images: images.rot90(1, (1, 2)),
    "inverted": lambda images: 1 - images,
    "flipped": lambda images: images.flip(2),
    "half turn": lambda images: images.rot90(2, (1, 2)),
    "transposed": lambda images: images.transpose(1, 2),
    "halves swapped": lambda images: images.roll(4, 2),
    "rotated back": lambda images: images.rot90(3, (1, 2)),
    "inverted, rotated": lambda images: 1 - images.rot90(1, (1, 2)),
    "shifted": lambda images: images.roll(1, 2),
    "noisy": _noisy,
}


def cache() -> Path:
    """The folder that holds the file."""
    chosen = os.environ.get("MERGETOOL_TEST_CACHE")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "mergetool" / "tests") / "digits"


def digits() -> tuple[Data, Data]:
    """The 1,297 images to train on and the 500 to test on, always the same."""
    rows = np.loadtxt(gzip.decompress(fetch()).decode().splitlines(), delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(rows))
    x, y = torch.from_numpy(rows[order, :-1] / 16), torch.from_numpy(rows[order, -1]).long()
    return Data(x[TEST:], y[TEST:]), Data(x[:TEST], y[:TEST])


def task(name: str, relabelled: bool = False) -> Task:
    """One of `CHANGES`; relabelled: its classes are numbered in an order of its own."""
    draw = torch.Generator().manual_seed(list(CHANGES).index(name))
    order = torch.randperm(10, generator=draw) if relabelled else torch.arange(10)
    changed = [
        Data(CHANGES[name](split.x.view(-1, 8, 8)).reshape(-1, 64).contiguous(), order[split.y]) for split in digits()
    ]
    return Task(f"{name}, relabelled" if relabelled else name, *changed)


def fetch() -> bytes:
    """The compressed file, from the cache, from scikit-learn if it is installed, or from its wheel."""
    kept = cache() / "digits.csv.gz"
    if kept.exists():
        return _checked(kept.read_bytes(), str(kept))
    package = find_spec("sklearn")
    if package and package.origin:
        installed = Path(package.origin).parents[1] / INSIDE
        return _checked(installed.read_bytes(), str(installed))
    content = _checked(_downloaded(), WHEEL)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(content)
    return content


def _downloaded() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", WHEEL]
        done = subprocess.run([*pip, "-d", folder], capture_output=True, text=True, timeout=SECONDS)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UnavailableError(
                f"the digits are not in {cache()}, scikit-learn is not installed, and pip cannot download {WHEEL}:\n"
                f"{done.stderr.strip()}\nput {INSIDE} of any scikit-learn wheel into {cache()}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(INSIDE)


def _checked(content: bytes, where: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UnavailableError(f"digits.csv.gz of {where} has sha256 {found}, not {SHA256}")
    return content
