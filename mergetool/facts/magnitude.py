"""The exact k-th largest magnitude of a tensor's or a whole model's delta, by counting bit patterns twice.

Magnitudes are taken as float32, whose bit patterns sort like the numbers. A first pass counts them by their upper 16
bits, which tells the bin that holds the k-th; a second counts those in the bin by their lower 16. Counts of tiles,
tensors and parts just add up, in any order, so the cut is exact however the work was divided. Ties cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mergetool.kernels.rounding import OVERFLOW

Counts = NDArray[np.int64]
"""Shape [sources, 65536]."""
CountPass = Callable[[bool, NDArray[np.uint32]], Counts]
"""``count(within, prefix)``: counts by upper bits, or by lower bits within each source's prefix."""

INFINITY = 0x7F800000
"""The bits of an infinite float32, which a float64 delta may round to."""
SKIP = np.uint32(0xFFFFFFFF)
"""A prefix that no magnitude has: the source is not looked at."""


def _select(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """Return the bin that holds the rank-th largest (1 is the largest) and the rank within that bin."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before


def _smallest_that_rounds_to(bits: int) -> float:
    """Return the smallest float64 that rounds to the float32 of these bits, so that a float64 may be compared."""
    if bits == 0:
        return 0.0
    if bits == INFINITY:
        return OVERFLOW["F32"]
    here = float(np.uint32(bits).view(np.float32))
    below = float(np.uint32(bits - 1).view(np.float32))
    middle = (here + below) / 2.0
    return middle if bits % 2 == 0 else float(np.nextafter(middle, np.inf))


def kept(density: float, size: int) -> int:
    """How many of ``size`` entries a density keeps: at least one."""
    return max(1, int(density * size))


def trivial(density: float) -> bool:
    """Whether the cut is known without looking: everything or nothing is kept."""
    return density >= 1.0 or density <= 0.0


def cuts(densities: tuple[float, ...], size: int, count: CountPass) -> tuple[float, ...]:
    """For each source the float64 cut such that ``|delta| >= cut`` keeps its ``density`` of ``size`` entries.

    Args:
        densities: the share kept of each source.
        size: the number of entries that were or will be counted for each source.
        count: makes a counting pass over all of them; called twice, or not at all when every density is trivial.
    """
    result = [0.0 if density >= 1.0 else np.inf for density in densities]
    looked = [i for i, density in enumerate(densities) if not trivial(density)]
    if not looked or size == 0:
        return tuple(result)
    prefix = np.full(len(densities), SKIP, np.uint32)
    ranks = {}
    upper = count(False, prefix)
    for i in looked:
        place, ranks[i] = _select(upper[i], kept(densities[i], size))
        prefix[i] = place
    lower = count(True, prefix)
    for i in looked:
        place, _ = _select(lower[i], ranks[i])
        result[i] = _smallest_that_rounds_to((int(prefix[i]) << 16) | place)
    return tuple(result)
