"""Whether a model folder is what its provenance says: its bytes, its files, its config, some tensors made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergetool.errors import CheckpointError, MergetoolError
from mergetool.execute.devices import gpu_memory
from mergetool.execute.verify_again import again
from mergetool.publish import PROVENANCE, PROVENANCE_FORMAT, header_digest
from mergetool.publish.loadable import CannotTell, misfits
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


@gpu_memory()
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
        sample: how many tensors to make again from the sources.
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


def _again(folder: Path, record: Mapping[str, Any], headers: Mapping[str, Header], *how: Any) -> tuple[bool, str]:
    try:
        wrong, good = again(folder, record, headers, *how)
    except CannotTell as why:
        return True, f"{SKIPPED}{why}"
    return not wrong, _said(wrong, good)
