"""Adapters: Python files that make the networks that transformers does not know, and read their data."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mergetool.errors import PlanError
from mergetool.publish.loadable import first_line
from mergetool.recipe.data import Data
from mergetool.recipe.files import fault
from mergetool.storage.digest import file_digest

if TYPE_CHECKING:
    import torch

_FUNCTIONS = {
    "network": "network(config: dict) -> torch.nn.Module",
    "read": "read(path, samples, seed) -> list[dict[str, torch.Tensor]]",
}


@dataclass(frozen=True)
class Adapter:
    """What a file of the user's says about models that transformers does not know."""

    file: Path
    network: Callable[[dict[str, Any]], torch.nn.Module]
    """Makes a network of a config, its parameters named as on disk."""
    read: Callable[[Path, int, int], list[dict[str, torch.Tensor]]]
    """Makes batches of a file: keyword inputs of a forward pass, the samples along the first axis of each."""
    digest: str
    """The SHA-256 of the file, in hexadecimal."""

    def batches(self, file: Path, data: Data, seed: int, labels: bool) -> tuple[Mapping[str, torch.Tensor], ...]:
        """The batches of a file or folder.

        Raises:
            PlanError: the adapter fails, gives something else, or gives no labels though they are asked for.
        """
        try:
            found = self.read(file, data.samples, seed)
        except Exception as error:  # whatever the user's code raises
            raise PlanError(f"`read` fails on {file}: {_told(error)}", _place(self.file, error)) from error
        if not isinstance(found, list | tuple) or not found:
            raise PlanError(f"`read` of {file} gives {_kind(found)}, not a list of batches", str(self.file))
        for batch in found:
            self._check(batch, file)
        if not labels:
            return tuple({name: x for name, x in batch.items() if name != "labels"} for batch in found)
        if any("labels" not in batch for batch in found):
            what = f"`read` of {file} gives no `labels`, and they are needed"
            raise PlanError(what, str(self.file), "add `labels` to every batch")
        return tuple(found)

    def _check(self, batch: Any, file: Path) -> None:
        import torch

        inputs = {name: x for name, x in batch.items() if name != "labels"} if isinstance(batch, Mapping) else {}
        if not inputs or not all(isinstance(x, torch.Tensor) and x.ndim for x in batch.values()):
            what = f"`read` of {file} gives {_kind(batch)} as a batch"
            raise PlanError(what, str(self.file), "make each a dict of tensors, with the samples along the first axis")
        counts = {name: len(x) for name, x in batch.items()}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            said = ", ".join(f"{count} of `{name}`" for name, count in counts.items())
            raise PlanError(f"`read` of {file} gives a batch of unequal or no samples: {said}", str(self.file))


def load_adapter(file: Path, trust_code: bool) -> Adapter:
    """Run an adapter's file, if the user allows it; nothing is written beside it.

    Raises:
        PlanError: it is not allowed, is not there, fails, or lacks a function.
    """
    if (problem := fault(file, str(file), "calibration.adapter")) is not None:
        raise PlanError(problem)
    if not trust_code:
        fix = "read it, and add `--trust-code` if you trust it"
        raise PlanError("the recipe's adapter is code, which is not run unless you say so", str(file), fix)
    digest = file_digest(file)
    module = ModuleType(f"mergetool_adapter_{digest[:16]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and pickle look for their module there
    try:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except Exception as error:  # whatever the user's code raises
        raise PlanError(f"the adapter fails: {_told(error)}", _place(file, error)) from error
    for name, signature in _FUNCTIONS.items():
        if not callable(getattr(module, name, None)):
            raise PlanError(f"the adapter has no function `{name}`", str(file), f"write `def {signature}`")
    return Adapter(file, module.network, module.read, digest)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _place(file: Path, error: Exception) -> str:
    """The last line of the adapter that was running."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(sorted({type(x).__name__ for x in value.values()})) or 'nothing'}"
    nothing = value is None or (isinstance(value, list | tuple) and not value)
    return "nothing" if nothing else f"a {type(value).__name__}"
