"""What a finished run has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergetool.plan.parts import Share
from mergetool.plan.work import Plan


@dataclass(frozen=True)
class Report:
    """The outcome of a run."""

    plan: Plan
    output: Path
    digests: Mapping[str, str]
    """The digest of every output tensor's bytes, by name."""
    notes: tuple[str, ...]
    """What a user should know: the plan's notes and what was found while running."""
    nonfinite: Mapping[str, int]
    """How many coordinates of a tensor had a NaN or an infinity in a source or the result; only those with any."""
    seconds: float
    """What it took once the libraries were loaded."""
    resumed: int
    """Jobs that an earlier, interrupted run had already done."""
    bytes_read: int
    """Bytes read from the sources, every pass counted."""
    unchanged: bool = False
    """Whether the output was already complete and nothing had to be done."""
    tasks: tuple[Report, ...] = ()
    """The models in the output, where there is one for each task."""

    @property
    def bytes_written(self) -> int:
        """Bytes of all weight files."""
        return sum(each.bytes_written for each in self.tasks) if self.tasks else self.plan.bytes_written


@dataclass(frozen=True)
class PartReport:
    """The outcome of a part of a run."""

    share: Share
    output: Path
    """What all parts together are made into."""
    digests: Mapping[str, str]
    """The digest of every tensor of the part, by name."""
    notes: tuple[str, ...]
    """What a user should know: the plan's notes and what was found in this part."""
    nonfinite: Mapping[str, int]
    """How many coordinates of a tensor had a NaN or an infinity; only those with any."""
    seconds: float
    resumed: int
    """Jobs that were already done."""
    bytes_read: int
    """Bytes read from the sources, every pass counted."""
    bytes_written: int
    """Bytes of the part's tensors."""
    missing: tuple[Share, ...]
    """The parts that are not done yet, as far as their journals say."""
    unchanged: bool = False
    """Whether the whole output was already complete."""
