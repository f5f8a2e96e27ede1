"""Meaning to work: stages, jobs, shards, memory; show."""

from mergetool.plan.build import SHARD_SIZE, build, check
from mergetool.plan.report import Report
from mergetool.plan.work import Job, Memory, Plan, Read, Route, Source, Stage

__all__ = [
    "SHARD_SIZE",
    "Job",
    "Memory",
    "Plan",
    "Read",
    "Report",
    "Route",
    "Source",
    "Stage",
    "build",
    "check",
]
