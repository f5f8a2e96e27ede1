"""Where a model that is run gets its weights from: by their names on disk, one tensor at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mergetool.checkpoint.checkpoint import Checkpoint, fetch
from mergetool.errors import CheckpointError, NonFinite
from mergetool.storage.dtypes import DType
from mergetool.storage.header import Entry
from mergetool.storage.reader import Reader


class Weights(Protocol):
    """Named tensors that can be asked for one by one: a source, a source that was turned, a merge on the fly."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor by its name on disk."""

    def get(self, name: str) -> torch.Tensor:
        """A tensor in its shape: float32 if it holds floats, else as it is; the caller may keep and change it."""


class CheckpointWeights:
    """The weights of a checkpoint, read when they are asked for.

    Args:
        checkpoint: a model on this disk.
        readers: its weight files, opened.
    """

    def __init__(self, checkpoint: Checkpoint, readers: Mapping[str, Reader]) -> None:
        self.checkpoint = checkpoint
        self.shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(
            {name: ref.shape for name, ref in checkpoint.tensors.items()}
        )
        self._readers = readers

    def get(self, name: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: its type cannot be computed with, or the file is damaged.
            RunError: the disk fails.
        """
        ref = self.checkpoint.tensors[name]
        raw = self._readers[ref.file].read(Entry(name, ref.dtype, ref.shape, ref.start, ref.start + ref.nbytes))
        return tensor_of(raw, ref.dtype, ref.shape, f"{self.checkpoint.label}: {name}")


@contextlib.contextmanager
def open_weights(checkpoint: Checkpoint) -> Iterator[CheckpointWeights]:
    """Open a checkpoint's weight files for a while; those of a repo on the Hub are fetched first.

    Raises:
        CheckpointError: a file cannot be fetched or opened.
        SourceChanged: a file is not what it was when the checkpoint was opened.
    """
    checkpoint = fetch(checkpoint, checkpoint.weight_files)
    with contextlib.ExitStack() as stack:
        readers = {
            file: stack.enter_context(Reader(checkpoint.file(file), checkpoint.headers.get(file)))
            for file in checkpoint.weight_files
        }
        yield CheckpointWeights(checkpoint, readers)


def tensor_of(raw: NDArray[Any], dtype: DType, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """Raw storage as a tensor: float32 if it holds floats, else as it is.

    Args:
        raw: the storage, flat.
        dtype: what it holds.
        shape: the tensor's.
        where: the tensor, for messages.

    Raises:
        CheckpointError: its type cannot be computed with.
    """
    found = getattr(torch, dtype.torch_name, None)
    if found is None or dtype.bits < 8:
        raise CheckpointError(f"holds {dtype}, which cannot be computed with", where)
    values = torch.from_numpy(raw.view(np.uint8)).view(found).reshape(shape)
    return values.float() if dtype.is_float else values


def refuse_nonfinite(name: str, tensor: torch.Tensor) -> None:
    """Refuse a weight with a NaN or an infinity.

    Raises:
        NonFinite: it has one.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise NonFinite(
            "the weight holds a NaN or an infinity, so nothing can be measured with it",
            name,
            "mend the model, or leave it out of the recipe",
        )
