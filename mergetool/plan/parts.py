"""A run in parts: which jobs are whose, known from the plan alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mergetool.errors import PlanError
from mergetool.plan.work import Job, Plan


@dataclass(frozen=True, order=True)
class Share:
    """One of several shares of a plan's jobs: ``2/8`` is the second of eight.

    Raises:
        PlanError: there is no such part.
    """

    part: int
    parts: int

    def __post_init__(self) -> None:
        if not 1 <= self.part <= self.parts:
            raise PlanError(f"there is no part {self}", "--part", "count from 1: `--part 1/8` to `--part 8/8`")

    def __str__(self) -> str:
        return f"{self.part}/{self.parts}"

    def of(self, jobs: Sequence[Job]) -> tuple[Job, ...]:
        """The share's jobs; there may be none."""
        return tuple(jobs[i] for i in share(jobs, self.part, self.parts))

    def all(self) -> tuple[Share, ...]:
        """Every share of as many."""
        return tuple(Share(part, self.parts) for part in range(1, self.parts + 1))


def owners(jobs: Sequence[Job], parts: int) -> tuple[int, ...]:
    """For each job the part that makes it: neighbours together, and about as many bytes for each part.

    A job belongs to the part that its middle byte falls into, of those read and written. Memory and workers do not
    count, so that machines that differ in them agree.
    """
    costs = [job.bytes_read + job.bytes_written + 1 for job in jobs]
    total, before, found = sum(costs), 0, []
    for cost in costs:
        found.append((2 * before + cost) * parts // (2 * total) + 1)
        before += cost
    return tuple(found)


def share(jobs: Sequence[Job], part: int, parts: int) -> tuple[int, ...]:
    """The places of one part's jobs."""
    return tuple(i for i, owner in enumerate(owners(jobs, parts)) if owner == part)


def needed(plan: Plan, jobs: Iterable[Job]) -> Plan:
    """The plan with those jobs alone, and the jobs whose tensors must be measured for them."""
    names = {job.name for job in jobs}
    measured = {job.method for job in plan.jobs if job.name in names and job.facts}
    kept = (job for job in plan.jobs if job.name in names or (job.facts and job.method in measured))
    return replace(plan, jobs=tuple(kept))
