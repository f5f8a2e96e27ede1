"""What aligning models comes to: how each is turned when it is read, and what that gains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from mergetool.anatomy import Group, Turning
from mergetool.execute.fact_folder import Facts
from mergetool.facts.matching import Match


@dataclass(frozen=True)
class Aligned:
    """One source that faces the reference.

    Attributes:
        label: the source.
        groups: what may change places.
        turning: what does when the source is read; nothing where nothing gains.
        matches: what was found, in the order of the groups.
        facts: where it is kept: ``GROUP:permutation``, int64 [size], and ``GROUP:scores``, float64 [3]: with all
            units in their own places, as found, and the share of units that moved.
    """

    label: str
    groups: tuple[Group, ...]
    turning: Turning
    matches: tuple[Match, ...]
    facts: Facts

    @property
    def moved(self) -> tuple[Match, ...]:
        """The groups in which anything changes its place."""
        return tuple(match for match in self.matches if match.moved)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know: the gain of each kind of group, or that nothing gains."""
        found = list(self._gains()) if self.moved else ["faces the reference already, nothing is turned"]
        return tuple(f"{self.label}: {note}" for note in (*found, *self.facts.notes))

    def _gains(self) -> Iterator[str]:
        kind_of = {group.name: group.kind for group in self.groups}
        kinds: dict[str, list[Match]] = {}
        for match in self.matches:
            kinds.setdefault(kind_of[match.group], []).append(match)
        for kind, matches in kinds.items():
            sizes = [match.size for match in matches]
            each = ([getattr(match, name) for match in matches] for name in ("identity", "found", "moved"))
            before, after, moved = (float(np.average(values, weights=sizes)) for values in each)
            if not moved:
                yield f"{kind} stay as they are: {before:.3f} of a perfect match"
                continue
            yield f"{kind} turned: {before:.3f} → {after:.3f} of a perfect match, {moved:.1%} of the units moved"


@dataclass(frozen=True, eq=False)
class Alignment(Mapping[int, Turning]):
    """How each source is turned, by its place in the plan's sources; the reference stands for itself and is left out.

    Attributes:
        reference: the place of the reference.
        sources: what was found for every other source.
    """

    reference: int
    sources: Mapping[int, Aligned]

    def __getitem__(self, source: int) -> Turning:
        return self.sources[source].turning

    def __iter__(self) -> Iterator[int]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was gained, or that nothing was, source by source."""
        return tuple(note for each in self.sources.values() for note in each.notes)
