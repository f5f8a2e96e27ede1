"""What is made ahead of the jobs and kept beside them, for the run, for its parts and for what finishes them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from mergetool.execute.locks import FACTS
from mergetool.execute.measure import FOLDER
from mergetool.execute.prepare import prepare
from mergetool.execute.prepared import Prepared
from mergetool.execute.progress import Progress, Quiet
from mergetool.execute.report.draw import keep
from mergetool.execute.staging import Staging
from mergetool.plan import Plan
from mergetool.storage.writer import atomic_write

_BESIDE = "beside"
"""Where files are kept that go into the model folder as they are, for the parts and for what finishes them."""
_FOUND = "found.json"
"""Where what was found ahead of the jobs is said, beside the facts, for the parts and for what finishes them."""


def made_ahead(plan: Plan, stage: Staging, trust_code: bool, device: str, progress: Progress | None) -> Prepared:
    """What is turned, measured and trained ahead of the jobs; nothing where no job asks for anything.

    A run of the whole finds it in the cache or leaves it there. Of parts the first makes it and the others wait; they
    may be on machines with caches of their own, so it is kept beside what they make.

    Raises:
        MergetoolError: as :func:`mergetool.execute.prepare.prepare`.
    """
    if all(stage.name == "merge" or stage.jobs_alone for stage in plan.stages):
        return Prepared(plan)
    folder = stage.path / FOLDER
    with stage.alone(FACTS):
        root = None if stage.share is None else folder
        runs: dict[str, Any] = {"trust_code": trust_code, "device": device, "root": root}
        found = prepare(plan, progress=progress, **runs)
        folder.mkdir(exist_ok=True)
        notes = keep(plan, found, folder, progress=progress or Quiet(), **runs)
        said = {"notes": [*found.notes, *notes], "left_out": sorted(found.left_out)}
        atomic_write(folder / _FOUND, json.dumps(said, ensure_ascii=False))
        for name, content in found.beside.items():
            (folder / _BESIDE / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / _BESIDE / name, content)
    return found


def made_beside(stage: Staging) -> dict[str, bytes]:
    """The files that were made ahead of the jobs to stand beside the tensors, by their names in the model folder."""
    folder = stage.path / FOLDER / _BESIDE
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_findings(plan: Plan, stage: Staging) -> Plan:
    """The plan, with what was found ahead of the jobs: notes, and which sources are left out."""
    try:
        found = json.loads((stage.path / FOLDER / _FOUND).read_bytes())
        return replace(plan, notes=(*plan.notes, *found["notes"]), left_out=frozenset(found["left_out"]))
    except (FileNotFoundError, ValueError):
        return plan
