"""Memory that is taken once by each worker and used again for every tile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.storage.system import PAGE

Bytes = NDArray[np.uint8]


def aligned(nbytes: int) -> Bytes:
    """A new buffer that begins with a page."""
    raw: Bytes = np.empty(nbytes + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + nbytes]


class Arena(threading.local):
    """A worker's own buffer, cut anew for each tile or tensor; grows to the largest wanted and stays.

    Args:
        allocate: makes a buffer that begins with a page.
    """

    def __init__(self, allocate: Callable[[int], Bytes] = aligned) -> None:
        self._allocate = allocate
        self._buffer = aligned(0)

    def take(self, sizes: Sequence[int]) -> list[Bytes]:
        """Buffers of these many bytes; those taken before are given up."""
        rounded = [-(-size // PAGE) * PAGE for size in sizes]
        if sum(rounded) > self._buffer.nbytes:
            self._buffer = aligned(0)  # let go of the old one first
            self._buffer = self._allocate(sum(rounded))
        starts = np.cumsum([0, *rounded])
        return [self._buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def typed(buffer: Bytes, storage: np.dtype[Any]) -> NDArray[Any]:
    """A buffer's bytes as elements."""
    return buffer.view(storage)
