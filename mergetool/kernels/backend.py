"""What a place of computation offers: the three kinds of kernel made from a coordinate text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]
Text = Callable[..., Any]

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

    def combine(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout
    ) -> Callable[..., int]:
        """Make ``combine(start, inputs, out, keys, *measures, *arguments)``: fill out, count what is not finite."""

    def sums(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, terms: int
    ) -> Callable[..., None]:
        """Make ``sums(start, inputs, partial, keys, *arguments)``; partial is float64 of shape [blocks, terms]."""

    def histogram(self, layout: Layout, within: bool) -> Callable[..., None]:
        """Make ``histogram(inputs, counts, prefix)``: add the float32 magnitudes of each delta to ``counts``.

        ``counts`` is int64 of shape [sources, 65536]: by upper 16 bits, or ``within`` those whose upper bits are the
        source's ``prefix`` by lower 16.
        """


def compiled() -> Backend:
    """The kernels compiled for this machine's CPU."""
    from mergetool.kernels import compile

    module: ModuleType = compile
    return module


def blocks(size: int) -> int:
    """The number of blocks in a tile."""
    return -(-size // BLOCK)


def measure_names(tensors: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a text's positional arguments that are measures."""
    return tuple(t for t in tensors if t not in ("base", "value", "delta", "chance"))
