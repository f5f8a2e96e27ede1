"""The exact k-th largest magnitude of a tensor's or a whole model's delta, by counting above a few thresholds.

Magnitudes are taken as float32, whose bit patterns sort like the numbers. A sample tells where the k-th should be;
one pass counts how many magnitudes reach each of eight thresholds around it, or of just two where the sample is full
of ties there; when few are left between two thresholds another pass gathers them. Counts of tiles, tensors and parts
just add up, in any order, and a wrong guess only costs another pass, so the cut is exact however the work was
divided. Ties cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mergetool.kernels.backend import FEW_THRESHOLDS, THRESHOLDS
from mergetool.kernels.rounding import OVERFLOW

Bits = NDArray[np.uint32]
Counts = NDArray[np.int64]

INFINITY = 0x7F800000
"""The bits of an infinite float32, which a float64 delta may round to."""
ABOVE_ALL = 0x80000000
"""One more than the bits of any magnitude."""
SAMPLE = 1 << 16
"""Magnitudes of a source that are looked at to guess its cut."""
LARGEST_GATHER = 1 << 17
"""Magnitudes of a source gathered at once, at most."""
CHEAP_GATHER = 1 << 12
"""So few that gathering them always beats counting again."""
SPREAD = (-5.0, -1.5, -0.5, 0.0, 0.5, 1.5, 5.0)
"""Where thresholds lie around the guess, in standard deviations of a sample's quantile."""
MIDDLE = SPREAD.index(0.0)
TIED = slice(1, -1)
"""The places of these that hold one and the same magnitude where the quantile is one that many have."""


class Look(Protocol):
    """Ways to look at the magnitudes of all sources' deltas."""

    def sample(self, share: float) -> list[Bits]:
        """About a ``share`` of each source's magnitudes, all of them when it is 1."""

    def above(self, thresholds: Bits) -> Counts:
        """How many magnitudes of each source reach each threshold; both [sources, n], n one of the kernels' two."""

    def between(self, low: Bits, high: Bits) -> list[Bits]:
        """Each source's magnitudes in ``low <= bits < high``."""


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


@dataclass
class _Search:
    """What is known of one source's cut: ``count(low) >= rank > count(high)``, where count is of those that reach."""

    rank: int
    size: int
    low: int = 0
    high: int = ABOVE_ALL
    above: int = 0
    """How many reach ``high``."""
    reach: int = -1
    """How many reach ``low``."""
    sampled: tuple[int, ...] = ()
    """What the sample has at the places of SPREAD around the quantile; nothing once it was asked."""
    tied: bool = False
    """Whether the sample's quantile is probably the cut itself."""
    sample: Bits | None = None
    """Kept for a second question: which magnitudes that many have lie between low and high."""

    def __post_init__(self) -> None:
        self.reach = self.size

    @property
    def found(self) -> bool:
        """Whether ``low`` is the cut."""
        return self.high == self.low + 1

    @property
    def few(self) -> bool:
        """Whether so few are left that gathering them is cheaper than counting again."""
        return self.reach - self.above <= min(max(CHEAP_GATHER, self.size >> 7), LARGEST_GATHER)

    def ask(self, sample: Bits) -> None:
        """Look where in a sample the cut should be."""
        middle = len(sample) * self.rank / self.size
        deviation = np.sqrt(max(middle * (1 - self.rank / self.size), 1.0))
        from_above = np.clip([middle + step * deviation for step in SPREAD], 0, len(sample) - 1).astype(int)
        places = len(sample) - 1 - from_above
        found = np.partition(sample, sorted(set(places.tolist())))[places]
        self.sampled, self.sample = tuple(found.tolist()), sample
        self.tied = len(set(self.sampled[TIED])) == 1

    def guesses(self, count: int) -> Bits:
        """Thresholds strictly between low and high: around the sample's quantile at first, then evenly."""
        if count == FEW_THRESHOLDS:
            self.tied = False
            values = [self.sampled[MIDDLE], self.sampled[MIDDLE] + 1]
        elif self.sampled:
            values = [*self.sampled, self.sampled[MIDDLE] + 1]
            self.sampled, self.tied = (), False
        elif self.sample is not None and len(common := self._common(self.sample)):
            values = [value for each in common.tolist() for value in (each, each + 1)]
            values += [values[-1]] * (count - len(values))
            self.sample = None
        else:
            values = [self.low + (self.high - self.low) * i // (count + 1) for i in range(1, count + 1)]
        inside = [min(max(value, self.low + 1), self.high - 1) for value in values]
        return np.array(inside, np.uint32)

    def _common(self, sample: Bits) -> Bits:
        """The magnitudes of a sample between low and high that are nearest to where the cut should be; at most four."""
        inside = sample[(sample >= self.low) & (sample < self.high)]
        if not len(inside):
            return inside
        place = int(len(inside) * (1 - (self.rank - self.above) / max(self.reach - self.above, 1)))
        likely = np.partition(inside, min(place, len(inside) - 1))[min(place, len(inside) - 1)]
        distinct = np.unique(inside)
        first = max(int(np.searchsorted(distinct, likely)) - 1, 0)
        return distinct[first : first + THRESHOLDS // 2]

    def learn(self, thresholds: Bits, counts: Counts) -> None:
        """Move low and high to the nearest thresholds."""
        for threshold, count in zip(thresholds.tolist(), counts.tolist(), strict=True):
            if count >= self.rank and threshold > self.low:
                self.low, self.reach = threshold, count
            elif count < self.rank and threshold < self.high:
                self.high, self.above = threshold, count

    def finish(self, among: Bits) -> None:
        """Find the cut among all magnitudes from low to high."""
        place = len(among) - (self.rank - self.above)
        self.low = int(np.partition(among, place)[place])
        self.high = self.low + 1


def cuts(densities: tuple[float, ...], size: int, look: Look) -> tuple[float, ...]:
    """For each source the float64 cut such that ``|delta| >= cut`` keeps its ``density`` of ``size`` entries.

    Args:
        densities: the share kept of each source.
        size: the number of entries of each source.
        look: goes over them; not called when every density is trivial.
    """
    result = [0.0 if density >= 1.0 else np.inf for density in densities]
    wanted = {i: _Search(kept(d, size), size) for i, d in enumerate(densities) if not trivial(d)}
    if not wanted or size == 0:
        return tuple(result)
    share = min(1.0, SAMPLE / size)
    samples = look.sample(share)
    for i, search in wanted.items():
        if share == 1.0:
            search.finish(samples[i])
        elif len(samples[i]):
            search.ask(samples[i])
    while left := {i: search for i, search in wanted.items() if not search.found}:
        if all(search.few for search in left.values()):
            _gather(left, len(densities), look)
        else:
            _count(left, len(densities), look)
    for i, search in wanted.items():
        result[i] = _smallest_that_rounds_to(search.low)
    return tuple(result)


def _gather(left: dict[int, _Search], sources: int, look: Look) -> None:
    low, high = np.full(sources, ABOVE_ALL, np.uint32), np.full(sources, ABOVE_ALL, np.uint32)
    for i, search in left.items():
        low[i], high[i] = search.low, search.high
    among = look.between(low, high)
    for i, search in left.items():
        search.finish(among[i])


def _count(left: dict[int, _Search], sources: int, look: Look) -> None:
    count = FEW_THRESHOLDS if all(search.tied for search in left.values()) else THRESHOLDS
    thresholds = np.full((sources, count), ABOVE_ALL, np.uint32)
    for i, search in left.items():
        thresholds[i] = search.guesses(count)
    counts = look.above(thresholds)
    for i, search in left.items():
        search.learn(thresholds[i], counts[i])
