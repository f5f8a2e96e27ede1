"""What a model was made from and how, to the tensor; enough to check the folder and to make it again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mergetool.plan import Job, Plan, Route, Source
from mergetool.plan.digest import run_digest
from mergetool.publish.page import PAGE
from mergetool.publish.privacy import Privacy
from mergetool.storage.header import Header
from mergetool.version import __version__

PROVENANCE = "provenance.json"
"""The file's name in a model folder."""
RECIPE = "mergetool.yaml"
"""The name in a model folder of the recipe as run, its absolute paths shortened."""
PROVENANCE_FORMAT = 2
"""Raised when the keys below change their meaning."""
_SAFETENSORS = "0.8"  # the version of the format that storage writes
_ORDINARY = frozenset(("merged", "copied", "compared", "lends its files"))


def provenance(
    plan: Plan,
    digests: Mapping[str, str],
    files: Mapping[str, str],
    notes: Sequence[str],
    privacy: Privacy,
) -> dict[str, Any]:
    """The content of ``provenance.json``: plain data without times, machines, paths or worker counts.

    Args:
        plan: what was run.
        digests: the digest of every output tensor, by name.
        files: the SHA-256 of every file of the folder that holds no tensors, this one left out.
        notes: what a user of the model should know.
        privacy: takes the user's paths out.
    """
    return {
        "format": PROVENANCE_FORMAT,
        "versions": _versions(drawn=PAGE in files),
        "plan": plan.digest,
        "run": run_digest(plan),
        **({"task": plan.task} if plan.task else {}),
        "recipe": privacy.hide_in(plan.recipe.canonical()),
        "lender": plan.lender,
        "tokenizer": plan.tokenizer,
        "sources": [_source(source, privacy) for source in plan.sources],
        "methods": _methods(plan.jobs, privacy),
        "routes": _routes(plan.routes, privacy),
        "data": dict(plan.data),
        "shards": {shard.file: _file(shard.header) for shard in plan.shards},
        "tensors": {job.name: digests[job.name] for job in plan.jobs},
        "files": dict(sorted(files.items())),
        "notes": list(notes),
    }


def _versions(drawn: bool) -> dict[str, str]:
    """The software that the bytes may depend on."""
    found = {"mergetool": __version__}
    for package in ("numpy", "numba", *(("matplotlib",) if drawn else ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found | {"safetensors_format": _SAFETENSORS, "python": platform.python_version()}


def _source(source: Source, privacy: Privacy) -> dict[str, Any]:
    checkpoint = source.checkpoint
    return {
        "label": privacy.names[source.label],
        "repo": checkpoint.repo,
        "commit": checkpoint.commit,
        "weights": {name: _file(header) for name, header in checkpoint.headers.items()},
    }


def _file(header: Header) -> dict[str, Any]:
    return {"size": header.file_size, "header": header_digest(header)}


def header_digest(header: Header) -> str:
    """A SHA-256 of what a header says: names, dtypes, shapes and places of the tensors, and the metadata."""
    entries = [(e.name, e.dtype.name, e.shape, e.start, e.stop) for e in header.entries.values()]
    content = json.dumps([entries, sorted(header.metadata.items())], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _methods(jobs: Sequence[Job], privacy: Privacy) -> list[dict[str, Any]]:
    """The tensors of each method with the same sources and parameters together."""
    groups: dict[str, dict[str, Any]] = {}
    for job in jobs:
        how = {
            "method": "added" if job.added else job.method or "copy",
            "sources": [read.source for read in job.reads],
            "parameters": dict(sorted(job.parameters.items())),
            **({"corrected": True} if job.corrected is not None else {}),
            **({"reason": privacy.hide(job.reason)} if job.reason else {}),
        }
        key = json.dumps(how, sort_keys=True)
        groups.setdefault(key, {**how, "tensors": []})["tensors"].append(job.name)
    return list(groups.values())


def _routes(routes: Sequence[Route], privacy: Privacy) -> list[dict[str, Any]]:
    """What became of the sources' tensors: counts, and names where a tensor did not go the ordinary way."""
    groups: dict[tuple[int, str, str], list[str]] = {}
    for route in routes:
        # An ordinary route's reason may be the tensor itself; it would make a group of each.
        by = "" if route.by == route.tensor or route.fate == "merged" else route.by
        groups.setdefault((route.source, route.fate, by), []).append(route.tensor)
    return [
        {
            "source": source,
            "fate": fate,
            **({"by": privacy.hide(by)} if by else {}),
            "count": len(names),
            **({} if fate in _ORDINARY else {"tensors": names}),
        }
        for (source, fate, by), names in groups.items()
    ]
