"""Where the tensors of turned sources lie: looked up by the tensor that a job reads, a few of them kept."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import Turning
from mergetool.checkpoint.checkpoint import TensorRef
from mergetool.errors import CheckpointError
from mergetool.plan import Plan, Read

Indices = Mapping[int, NDArray[np.int64]]
_KEPT = 64
"""Turns kept: each has an index array or two, as long as an axis."""


class Turns:
    """The turns of a plan's sources.

    Args:
        plan: the plan.
        turnings: what is turned, by the place of the source in the plan's sources.
    """

    def __init__(self, plan: Plan, turnings: Mapping[int, Turning]) -> None:
        self._turnings = turnings
        self._sources = plan.sources
        self._kept = lru_cache(maxsize=_KEPT)(self._find)

    def __contains__(self, source: int) -> bool:
        """Whether a source is turned."""
        return source in self._turnings

    def tensor(self, read: Read) -> TensorRef:
        """The tensor of the source that is read in the place of this one: another where experts change places.

        Raises:
            CheckpointError: it has another dtype or shape than the one whose place it takes.
        """
        if read.source not in self._turnings:
            return read.tensor
        name = self._turnings[read.source].source(read.tensor.name)
        if name == read.tensor.name:
            return read.tensor
        source = self._sources[read.source]
        found, wanted = source.checkpoint.tensors[name], read.tensor
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            what = f"is {found.dtype} {list(found.shape)} and takes the place of {wanted.name}, "
            what += f"which is {wanted.dtype} {list(wanted.shape)}"
            fix = "store them alike, or leave experts out of align.groups"
            raise CheckpointError(what, f"{source.label}: {name}", fix)
        return found

    def of(self, read: Read) -> tuple[TensorRef, Indices]:
        """The tensor of the source that is read, and the index array of each axis that is turned."""
        if read.source not in self._turnings:
            return read.tensor, {}
        return self._kept(read.source, read.tensor)

    def _find(self, source: int, tensor: TensorRef) -> tuple[TensorRef, Any]:
        return self.tensor(Read(source, tensor)), self._turnings[source].of(tensor.name, tensor.shape).indices
