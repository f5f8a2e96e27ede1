"""What blocks made of each batch, kept on disk while the rest of the network waits for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mergetool.errors import RunError
from mergetool.storage import system


class Outputs:
    """The outputs of the latest block of each stack, a file for each batch.

    Args:
        folder: where the files are; it is made if need be. What is kept there outlives the process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, block: str, batch: int) -> Path:
        return self.folder / block / f"{batch:06d}.safetensors"

    def put(self, block: str, batch: int, output: Any) -> None:
        """Keep what a block made: a tensor, or a tuple of which only the tensors are kept.

        Raises:
            RunError: it cannot be written.
            TypeError: it is neither.
        """
        path = self._file(block, batch)
        many = isinstance(output, (tuple, list))
        if not many and not isinstance(output, torch.Tensor):
            raise TypeError(f"a block made a {type(output).__name__}, no tensor and no tuple")
        items = list(output) if many else [output]
        tensors = {str(i): item.contiguous().cpu() for i, item in enumerate(items) if isinstance(item, torch.Tensor)}
        form = {"many": many, "length": len(items)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, metadata={"form": json.dumps(form)})
        except OSError as error:
            raise system.write_failure(error, path) from error
        except Exception as error:  # safetensors has its own errors for a full disk
            raise RunError(f"cannot be written: {error}", str(path), "make room for the activations") from error

    def get(self, block: str, batch: int, device: torch.device) -> Any:
        """What a block made of a batch.

        Raises:
            RunError: it is not there, or cannot be read.
        """
        path = self._file(block, batch)
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                form = json.loads(file.metadata()["form"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        except Exception as error:  # of safetensors, or of a file that is gone
            raise RunError(f"activations cannot be read: {error}", str(path), "run again") from error
        if not form["many"]:
            return tensors["0"]
        return tuple(tensors.get(str(i)) for i in range(form["length"]))

    def has(self, block: str, batches: int) -> bool:
        """Whether the outputs of all batches are there and whole."""
        try:
            for batch in range(batches):
                with safe_open(self._file(block, batch), "pt"):
                    pass
        except Exception:  # of safetensors, or of a file that is gone
            return False
        return True

    def drop(self, block: str) -> None:
        """Forget what a block made."""
        shutil.rmtree(self.folder / block, ignore_errors=True)
