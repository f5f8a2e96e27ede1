"""A plan for scripts: plain data, complete and in a stable order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mergetool.plan.work import Job, Plan, Read, Source

COPY, ADD = "copy", "add"
"""What a job without a method does, and one without sources."""


def does(job: Job) -> str:
    """What a job does, in a word: its method, or that it copies or adds."""
    return ADD if job.added else job.method or COPY


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain data; keys are only ever added."""
    return {
        "digest": plan.digest,
        "merge_method": plan.recipe.merge_method,
        "output": None if plan.output is None else str(plan.output),
        "sources": [_source(source) for source in plan.sources],
        "lender": plan.lender,
        "tokenizer": plan.tokenizer,
        "jobs": [_job(plan, job) for job in plan.jobs],
        "stages": [
            {
                "name": stage.name,
                "passes": stage.passes,
                "tensors": [plan.jobs[i].name for i in stage.jobs],
                "tokens": stage.tokens,
                "bytes_read": stage.bytes_read,
                "memory": stage.memory,
            }
            for stage in plan.stages
        ],
        "routes": [{"source": r.source, "tensor": r.tensor, "fate": r.fate, "by": r.by} for r in plan.routes],
        "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": list(s.header.entries)} for s in plan.shards],
        "memory": dataclasses.asdict(plan.memory),
        "totals": {
            "tensors": len(plan.jobs),
            "weights": sum(job.size for job in plan.jobs),
            "bytes_read": plan.bytes_read,
            "read_once": plan.read_once,
            "bytes_written": plan.bytes_written,
        },
        "tasks": [task.name for task in plan.correction.tasks if task.name] if plan.correction is not None else [],
        "notes": list(plan.notes),
    }


def _source(source: Source) -> dict[str, Any]:
    checkpoint = source.checkpoint
    return {
        "label": source.label,
        "repo": checkpoint.repo,
        "commit": checkpoint.commit,
        "path": None if checkpoint.path is None else str(checkpoint.path),
        "family": source.anatomy.family,
        "files": list(checkpoint.weight_files),
        "tensors": len(checkpoint.tensors),
        "bytes": sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
    }


def _job(plan: Plan, job: Job) -> dict[str, Any]:
    return {
        "name": job.name,
        "shape": list(job.shape),
        "dtype": job.dtype.name,
        "role": job.part.role,
        "layer": job.part.layer,
        "expert": job.part.expert,
        "depth": job.part.depth,
        "method": does(job),
        "reason": job.reason,
        "parameters": _plain(job.parameters),
        "facts": list(job.facts),
        "corrected": job.corrected,
        "passes": plan.passes(job),
        "reads": [_read_data(read) for read in job.reads],
        "compares": [_read_data(read) for read in job.compare],
    }


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}


def _read_data(read: Read) -> dict[str, Any]:
    tensor = read.tensor
    return {
        "source": read.source,
        "tensor": tensor.name,
        "dtype": tensor.dtype.name,
        "file": tensor.file,
        "offset": tensor.start,
        "bytes": tensor.nbytes,
    }
