"""What every source predicts on its own data: found once, kept as the largest logits and the weight of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save

from mergetool.errors import PlanError
from mergetool.execute.train.rows import Row, counted, join
from mergetool.facts.dam_losses import Target, condense
from mergetool.storage.writer import atomic_write

_FILE = 1 << 28  # bytes of one file, about
_FIELDS = ("logits", "indices", "rest")
_AT_ONCE = 8  # rows in one forward pass

Logits = Callable[[Row], torch.Tensor]


class Targets(Protocol):
    """The predictions of one teacher, by row."""

    def of(self, rows: Sequence[int]) -> Target:
        """What it predicts at the positions of these rows that count, row after row."""


def gather(targets: Sequence[Target]) -> Target:
    """The predictions of several rows as one."""
    return Target(*(_joined([getattr(target, name) for target in targets]) for name in _FIELDS))


def _joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def part(target: Target, start: int, stop: int) -> Target:
    """Some of the positions."""
    cut = (getattr(target, name) for name in _FIELDS)
    return Target(*(None if tensor is None else tensor[start:stop] for tensor in cut))


def predictions(rows: Sequence[Row], places: Sequence[int], logits: Logits, k: int, heat: float) -> Iterator[Target]:
    """What a teacher predicts on some of the rows, row after row."""
    for start in range(0, len(places), _AT_ONCE):
        for batch in join([rows[place] for place in places[start : start + _AT_ONCE]]):
            with torch.no_grad():
                made = logits(batch)
            if made.ndim < 2:
                raise PlanError(f"the model gives predictions of shape {tuple(made.shape)}, not [rows, ..., classes]")
            for row, mask in zip(made, counted(batch, made), strict=True):
                yield condense(row[mask].float(), k, heat)


@dataclass(frozen=True)
class Fresh:
    """Predictions that are made when asked for, of the whole vocabulary; the teacher is loaded each time."""

    rows: Sequence[Row]
    logits: Callable[[], Logits]
    temperature: float

    def of(self, rows: Sequence[int]) -> Target:
        """Load the teacher and ask it."""
        return gather(list(predictions(self.rows, rows, self.logits(), 0, self.temperature)))


@dataclass
class Kept:
    """Predictions in files ``STEM-00000.safetensors`` …, or in memory where there is no folder.

    Attributes:
        folder: where the files are.
        stem: what their names begin with; it says which data, teacher and temperature they are for.
    """

    folder: Path | None
    stem: str
    _memory: dict[int, Target] = field(default_factory=dict)
    _files: dict[int, Path] = field(default_factory=dict)
    _open: dict[Path, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self._paths():
            with safe_open(path, "pt") as file:
                self._files |= {int(name.partition(".")[0]): path for name in file.keys()}  # noqa: SIM118

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.stem}-?????.safetensors")) if self.folder else []

    def of(self, rows: Sequence[int]) -> Target:
        """Read them."""
        return gather([self._row(row) for row in rows])

    def _row(self, row: int) -> Target:
        if row in self._memory:
            return self._memory[row]
        path = self._files[row]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        file = self._open[path]
        present = [name for name in _FIELDS if f"{row}.{name}" in file.keys()]  # noqa: SIM118
        found = {name: file.get_tensor(f"{row}.{name}") for name in present}
        return Target(found["logits"], found["indices"].long() if "indices" in found else None, found.get("rest"))

    def complete(self, rows: Sequence[Row], logits: Callable[[], Logits], k: int, temperature: float) -> None:
        """Make what is not there yet; a killed run loses the file it was about to write.

        Args:
            rows: the data.
            logits: loads the teacher; not called when nothing is missing.
            k: logits kept of a position.
            temperature: of the rest.
        """
        missing = [row for row in range(len(rows)) if row not in self._files and row not in self._memory]
        if not missing:
            return
        waiting: dict[int, Target] = {}
        size = 0
        for row, target in zip(missing, predictions(rows, missing, logits(), k, temperature), strict=True):
            waiting[row] = target = Target(*(_held(getattr(target, name)) for name in _FIELDS))
            size += sum(tensor.nbytes for tensor in _present(target).values())
            # Rows that are asked together must be so again after a kill, or their last bits differ.
            if size >= _FILE and len(waiting) % _AT_ONCE == 0:
                self._keep(waiting)
                waiting, size = {}, 0
        self._keep(waiting)

    def _keep(self, waiting: Mapping[int, Target]) -> None:
        if self.folder is None:
            self._memory |= waiting
        elif waiting:
            path = self.folder / f"{self.stem}-{len(self._paths()):05d}.safetensors"
            tensors = {f"{row}.{name}": t for row, target in waiting.items() for name, t in _present(target).items()}
            tensors = {name: t.to(torch.int32) if t.dtype == torch.int64 else t for name, t in tensors.items()}
            atomic_write(path, save(tensors))
            self._files |= dict.fromkeys(waiting, path)


def _held(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu().contiguous()


def _present(target: Target) -> dict[str, torch.Tensor]:
    return {name: value for name in _FIELDS if (value := getattr(target, name)) is not None}
