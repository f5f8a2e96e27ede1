"""What a place of computation offers: the kernels made from a coordinate text, and two that look at magnitudes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]
Text = Callable[..., Any]

THRESHOLDS = 8
"""Thresholds counted in one pass over a delta."""
FEW_THRESHOLDS = 2
"""The same where the cut is as good as known: a kernel of its own, twice as fast."""
BLOCK = 1 << 16
"""Coordinates summed at once; sums of a tensor are the exact sum of its blocks', whatever the tiles were."""


@dataclass(frozen=True)
class Layout:
    """The dtypes of a kernel's tiles."""

    base: bool
    """Whether the first input is the base."""
    inputs: tuple[str, ...]
    """The dtype of each input, the base first."""
    output: str = "F64"
    extras: tuple[str, ...] = ()
    """Tensor arguments besides the sources' own: float32 tiles that follow the inputs, for each one of every source."""

    @property
    def sources(self) -> int:
        """The number of sources, the base not counted."""
        return len(self.inputs) - self.base


class Backend(Protocol):
    """Kernels over raw tiles: NumPy arrays of each dtype's storage (bfloat16 and float16 as uint16).

    ``tensors`` are the text's positional arguments: base, value, delta, chance, and measures by name (tuples with one
    float for each source). ``arguments`` are the parameters it uses: scalars, or tuples with one value for each
    source. ``start`` is the first coordinate of a tile in its tensor, ``keys`` the random keys of the sources.
    """

    @property
    def matrices(self) -> str:
        """The device of torch that whole matrices are solved on."""

    def combine(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout
    ) -> Callable[..., int]:
        """Make ``combine(start, inputs, out, keys, *measures, *arguments)``: fill out, count what is not finite."""

    def sums(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, terms: int
    ) -> Callable[..., None]:
        """Make ``sums(start, inputs, partial, keys, *arguments)``; partial is float64 of shape [blocks, terms]."""

    def above(self, layout: Layout, count: int = THRESHOLDS) -> Callable[..., None]:
        """Make ``above(inputs, thresholds, counts)``: count the magnitudes of each delta that reach each threshold.

        Magnitudes are the bits of a float32; ``thresholds`` is uint32 and ``counts``, added to, int64, both of shape
        [sources, count], where ``count`` is THRESHOLDS or FEW_THRESHOLDS.
        """

    def between(self, layout: Layout) -> Callable[..., None]:
        """Make ``between(inputs, low, high, found, used)``: gather each delta's magnitudes in ``low <= bits < high``.

        ``low`` and ``high`` are uint32 of shape [sources]; ``found``, uint32 of shape [sources, room], is filled from
        ``used``, int64 of shape [sources], on; what finds no room is left out.
        """


def compiled() -> Backend:
    """The kernels compiled for this machine's CPU, and LLVM loaded, so that the first tile does not wait for it."""
    from mergetool.kernels import compile

    compile.ready()
    module: ModuleType = compile
    return module


@cache
def with_torch(device: str) -> Backend:
    """The kernels of a device as torch names it: compiled for it where there is ``cuda.core``, else torch's own.

    Torch's take as many passes over a tile as a text has operations, and add sums up in an order of their own.
    """
    import torch

    if torch.device(device).type == "cuda" and torch.version.hip is None:
        try:
            from mergetool.kernels.cuda import Cuda

            return Cuda(device)
        except Exception as why:  # no such package, no compiler that it finds, none for this GPU: all is the same here
            told = f"{device}: kernels are not compiled for it but are torch's own operations, which are slower: {why}"
            told += "; see `GPUs` in docs/guide/resources.md" if isinstance(why, ImportError) else ""
            warnings.warn(told, RuntimeWarning, stacklevel=2)
    from mergetool.kernels.torch_arrays import TorchArrays

    return TorchArrays(device)


def blocks(size: int) -> int:
    """The number of blocks in a tile."""
    return -(-size // BLOCK)


def measure_names(tensors: tuple[str, ...], extras: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Those of a text's positional arguments that are measures."""
    return tuple(t for t in tensors if t not in ("base", "value", "delta", "chance", *extras))
