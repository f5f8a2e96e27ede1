"""Whether a model folder is what its provenance says: its bytes, its files, its config, some tensors made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergetool.checkpoint import hub
from mergetool.errors import CheckpointError, MergetoolError
from mergetool.plan import Job, Plan, build
from mergetool.plan.stages import wanted
from mergetool.plan.tasks import of_task
from mergetool.publish import PROVENANCE, PROVENANCE_FORMAT, RECIPE, header_digest, read_local
from mergetool.publish.loadable import CannotTell, first_line, misfits
from mergetool.publish.privacy import Privacy
from mergetool.recipe import Recipe, load
from mergetool.storage.digest import file_digest, tensor_digest
from mergetool.storage.header import Header, read_header
from mergetool.storage.reader import Reader

_READERS = 4
SKIPPED = "skipped: "
"""How the detail of a check begins that could not be made."""


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    """Also of a check that could not be made: it found nothing wrong."""
    detail: str

    @property
    def skipped(self) -> bool:
        """Whether the check could not be made."""
        return self.detail.startswith(SKIPPED)


@dataclass(frozen=True)
class Verification:
    """Everything that was looked at."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.ok for check in self.checks)


def verify(
    folder: Path,
    sample: int = 8,
    device: str = "cpu",
    recipe_folder: Path | None = None,
    trust_code: bool = False,
) -> Verification:
    """Check a model folder that mergetool made; every byte of it is read once, one block at a time.

    The tensors to make again are the same every time: the first, the largest, and others at equal distances over
    methods and sizes. That takes the memory of one tensor and its sources.

    Args:
        folder: the model folder.
        sample: how many tensors to make again from the sources; of those that need the whole model measured only one.
        device: where they are made.
        recipe_folder: where the recipe's relative paths start from; by default where the recipe lay, if the folder
            was made on this machine.
        trust_code: whether the recipe's adapter may be run; tensors are not made again where it may not.

    Raises:
        CheckpointError: the folder has no provenance that can be read.
    """
    folder = Path(folder)
    record = _record(folder)
    headers, wrong = _headers(folder, record)
    checks = [Check("headers", not wrong, _said(wrong, f"{len(headers)} files, {len(record['tensors'])} tensors"))]

    def check(name: str, look: Callable[[], tuple[bool, str]]) -> None:
        try:
            checks.append(Check(name, *look()))
        except MergetoolError as error:
            checks.append(Check(name, False, str(error)))

    check("index", lambda: _index(folder, headers))
    check("tensors", lambda: _tensors(folder, record, headers))
    check("files", lambda: _files(folder, record))
    check("config", lambda: _config(folder, headers))
    check("sources", lambda: _again(folder, record, headers, sample, device, recipe_folder, trust_code))
    return Verification(folder, tuple(checks))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / PROVENANCE).read_bytes())
    except (OSError, ValueError) as error:
        fix = "verify looks at folders that mergetool made"
        raise CheckpointError(f"has no {PROVENANCE} that can be read", str(folder), fix) from error
    needed = {"tensors": dict, "files": dict, "shards": dict, "sources": list}
    if not isinstance(record, dict) or record.get("format") != PROVENANCE_FORMAT:
        what = f"is not of format {PROVENANCE_FORMAT}, the one that this version of mergetool knows"
        raise CheckpointError(what, str(folder / PROVENANCE))
    if not all(isinstance(record.get(key), kind) for key, kind in needed.items()):
        raise CheckpointError("is incomplete", str(folder / PROVENANCE))
    if not all(isinstance(shard, dict) and shard.keys() >= {"size", "header"} for shard in record["shards"].values()):
        raise CheckpointError("is incomplete", str(folder / PROVENANCE))
    return record


def _said(wrong: Sequence[str], good: str) -> str:
    return good if not wrong else "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def _headers(folder: Path, record: Mapping[str, Any]) -> tuple[dict[str, Header], list[str]]:
    """The headers that can be read, and what is wrong with the others."""
    headers: dict[str, Header] = {}
    wrong = []
    for name, stated in record["shards"].items():
        try:
            header = headers[name] = read_header(folder / name)
        except MergetoolError as error:
            wrong += [f"{name} {problem.what}" for problem in error.problems]
            continue
        if header.file_size != stated["size"]:
            wrong.append(f"{name} has {header.file_size} bytes, {stated['size']} expected")
        if header_digest(header) != stated["header"]:
            wrong.append(f"the header of {name} was changed")
    found = {path.name for path in folder.glob("*.safetensors")}
    wrong += [f"{name} does not belong here" for name in sorted(found - record["shards"].keys())]
    return headers, wrong


def _index(folder: Path, headers: Mapping[str, Header]) -> tuple[bool, str]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(headers) == 1 and not indexes:
        return True, "one file, no index"
    if len(indexes) != 1:
        return False, f"{len(indexes)} index files, 1 expected"
    try:
        found = json.loads(indexes[0].read_bytes())
        stated, size = dict(found["weight_map"]), found["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return False, f"{indexes[0].name} cannot be read"
    held = {name: file for file, header in headers.items() for name in header.entries}
    wrong = [f"`{name}`" for name in sorted(held.keys() | stated.keys()) if held.get(name) != stated.get(name)]
    total = sum(entry.nbytes for header in headers.values() for entry in header.entries.values())
    if total != size:
        wrong.append(f"total_size is {size}, the tensors have {total}")
    return not wrong, _said(wrong, f"{len(held)} tensors where it says")


def _tensors(folder: Path, record: Mapping[str, Any], headers: Mapping[str, Header]) -> tuple[bool, str]:
    expected = record["tensors"]
    wrong: list[str] = []
    names: set[str] = set()
    with ThreadPoolExecutor(_READERS) as pool:
        for file, header in headers.items():
            with Reader(folder / file, header) as reader:
                names.update(header.entries)
                digests = pool.map(lambda entry, reader=reader: tensor_digest(reader, entry), header.entries.values())
                wrong += [
                    f"`{name}` differs" if name in expected else f"`{name}` does not belong here"
                    for name, digest in zip(header.entries, digests, strict=True)
                    if expected.get(name) != digest
                ]
    wrong += [f"`{name}` is missing" for name in expected if name not in names]
    return not wrong, _said(wrong, f"{len(names)} digests agree")


def _files(folder: Path, record: Mapping[str, Any]) -> tuple[bool, str]:
    """The files on record, and that there are no others; weights are told of with the headers."""
    wrong = []
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
        elif file_digest(folder / name) != digest:
            wrong.append(f"{name} was changed")
    known = {*record["files"], *record["shards"], PROVENANCE}
    wrong += [
        f"{name} does not belong here"
        for name in sorted(_visible(folder) - known)
        if "/" in name or not name.endswith(".safetensors")
    ]
    return not wrong, _said(wrong, f"{len(record['files'])} files agree")


def _visible(folder: Path) -> set[str]:
    """The relative names of the files of a folder; nothing loads a model from hidden ones."""
    names = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return {name for name in names if "/." not in f"/{name}"}


def _config(folder: Path, headers: Mapping[str, Header]) -> tuple[bool, str]:
    try:
        wrong = misfits(folder, headers)
    except CannotTell as why:
        return True, f"{SKIPPED}{why}"
    return not wrong, _said(wrong, "transformers has a place of that shape for every tensor")


def _again(
    folder: Path,
    record: Mapping[str, Any],
    headers: Mapping[str, Header],
    sample: int,
    device: str,
    recipe_folder: Path | None,
    trust_code: bool,
) -> tuple[bool, str]:
    from mergetool.execute import compute

    if sample < 1:
        return True, f"{SKIPPED}no tensor is to be made again"
    try:
        recipe = _recipe(folder, record, recipe_folder)
        if recipe is None:
            return True, f"{SKIPPED}nothing here says where the sources are; give --recipe-folder"
        plan = build(recipe)
        plan = of_task(plan, record["task"]) if record.get("task") else plan
    except (OSError, MergetoolError) as error:
        return True, f"{SKIPPED}the plan cannot be built again: {first_line(error)}"
    if changed := _changed(plan, record):
        return True, f"{SKIPPED}not the sources that it was made from: {changed}"
    if changed := _other_data(plan, record):
        return True, f"{SKIPPED}not the data that it was made with: {changed}"
    if recipe.calibration is not None and recipe.calibration.adapter is not None and not trust_code:
        fix = "read it, and add --trust-code if you trust it"
        return True, f"{SKIPPED}the recipe's adapter {recipe.calibration.adapter} is code; {fix}"
    held = {name: (file, entry) for file, header in headers.items() for name, entry in header.entries.items()}
    wrong, made = [], 0
    for job in chosen(plan.jobs, sample):
        if job.name not in held:
            continue
        if absent := _absent(plan, job):
            return True, f"{SKIPPED}{absent}"
        file, entry = held[job.name]
        made += 1
        if (entry.dtype, entry.shape) != (job.dtype, job.shape):
            is_, said = (f"{x.dtype.name} {list(x.shape)}" for x in (entry, job))
            wrong.append(f"`{job.name}` is {is_} and comes out as {said}")
            continue
        # What is known of the whole model needs all the jobs; any other tensor only its own sources' files.
        together = job.facts or wanted(job) or job.corrected is not None
        result = compute(plan if together else replace(plan, jobs=(job,)), job, device, trust_code)
        with Reader(folder / file) as reader:
            stored = reader.read(entry)
        if not np.array_equal(stored.view(np.uint8), np.asarray(result).view(np.uint8)):
            wrong.append(f"`{job.name}` comes out otherwise")
    return not wrong, _said(wrong, f"{made} of {len(plan.jobs)} tensors made again, the same bytes")


def _recipe(folder: Path, record: Mapping[str, Any], recipe_folder: Path | None) -> Recipe | None:
    """The recipe to make tensors again by; None where it would name local sources without their place."""
    local = read_local(folder)
    if local is not None:
        return replace(load(local.text.encode()), folder=recipe_folder or local.recipe_folder)
    if recipe_folder is None and not all(source.get("repo") for source in record["sources"]):
        return None
    return replace(load((folder / RECIPE).read_bytes()), folder=recipe_folder)


def _changed(plan: Plan, record: Mapping[str, Any]) -> str:
    """The first source whose headers or commit are not those on record."""
    names = Privacy.of(plan).names
    for source, stated in zip(plan.sources, record["sources"], strict=False):
        found = {name: header_digest(header) for name, header in source.checkpoint.headers.items()}
        said = {name: weights["header"] for name, weights in stated["weights"].items()}
        if (names[source.label], source.checkpoint.commit, found) != (stated["label"], stated["commit"], said):
            return names[source.label]
    return ""


def _other_data(plan: Plan, record: Mapping[str, Any]) -> str:
    """The first data whose content or settings are not those on record."""
    stated = record.get("data", plan.data)
    return next((name for name, found in plan.data.items() if stated.get(name) != found), "")


def _absent(plan: Plan, job: Job) -> str:
    """Which source of a job would have to be downloaded first."""
    for read in (*job.reads, *job.compare):
        source = plan.sources[read.source].checkpoint
        if source.repo and source.commit and not hub.cached_file(source.repo, source.commit, read.tensor.file):
            return f"{source.label} is not in the local cache"
    return ""


def chosen(jobs: Sequence[Job], count: int) -> list[Job]:
    """Some jobs, the same every time: the first, the largest, and others at equal distances over methods and sizes."""
    if not jobs or count < 1:
        return []
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i].method, jobs[i].size, i))
    largest = max(range(len(jobs)), key=lambda i: (jobs[i].bytes_written, -i))
    spread = [order[round(k * (len(order) - 1) / max(1, count - 1))] for k in range(count)]
    picked = list(dict.fromkeys((0, largest, *spread)))[:count]
    measured = [i for i in picked if jobs[i].facts]
    return [jobs[i] for i in picked if i not in measured[1:]]
