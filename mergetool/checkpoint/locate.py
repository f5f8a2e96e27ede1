"""Where a model is: a reference from a recipe, taken for a local path or for a Hub repo and its revision."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mergetool.errors import CheckpointError

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """A model as a recipe names it.

    Attributes:
        name: a local path, or ``org/name`` on the Hub.
        revision: a branch, tag or commit of the Hub repo.
        adapter: the reference of a LoRA adapter, itself with an optional ``@revision``.
    """

    name: str
    revision: str | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Location:
    """Where a model is; exactly one of ``path`` and ``repo`` is set.

    Attributes:
        label: the reference as the recipe wrote it.
        path: a local folder or file that exists.
        repo: ``org/name`` on the Hub; nobody has asked the Hub yet.
        revision: a branch, tag or commit of the repo.
    """

    label: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None


def parse_reference(text: str) -> Reference:
    """Take ``name[@revision][+adapter[@revision]]`` apart.

    Raises:
        CheckpointError: a part is empty or comes twice.
    """
    main, plus, adapter = text.partition("+")
    name, at, revision = main.partition("@")
    doubled = "+" in adapter or "@" in revision or adapter.count("@") > 1
    if doubled or not name.strip() or (at and not revision) or (plus and not adapter.partition("@")[0]):
        raise CheckpointError(
            "cannot be understood as a model",
            where=repr(text),
            fix="write `path`, `org/name`, `org/name@revision` or `org/name@revision+adapter`; "
            "a local path that holds @ or + must exist as it is written",
        )
    return Reference(name, revision or None, adapter or None)


def locate(reference: str, relative_to: Path | None = None) -> Location:
    """Find the local folder or file that ``reference`` names, or take it for a Hub repo.

    A path that exists exactly as written wins, whatever signs it holds. Relative paths are looked up from
    ``relative_to`` (the recipe's folder) first and from the working directory second, where other tools look.

    Raises:
        CheckpointError: the reference is malformed, names an adapter, or is a path that is not there.
    """
    found = _existing(reference, relative_to)
    if found is not None:
        return Location(reference, path=found)
    parsed = parse_reference(reference)
    if parsed.adapter is not None:
        raise CheckpointError(
            "LoRA adapters as sources are not supported yet",
            where=reference,
            fix=f"merge {parsed.adapter} into {parsed.name} first (peft: `merge_and_unload()`) "
            "and name the saved model here",
        )
    found = _existing(parsed.name, relative_to)
    if found is not None:  # then there is a revision, or the whole reference would have been found
        raise CheckpointError(
            f"a local path has no revisions, so @{parsed.revision} means nothing here",
            where=reference,
            fix=f"write {parsed.name}, or name the repo on the Hub",
        )
    near = _nearest(parsed.name, relative_to)
    if _can_be_repo(parsed.name, relative_to) and not near:
        return Location(reference, repo=parsed.name, revision=parsed.revision)
    fix = f"did you mean {' or '.join(near)}?" if near else "check the path; a Hub repo is written org/name"
    raise CheckpointError("no such folder or file", where=reference, fix=fix)


def _homes(relative_to: Path | None) -> Iterator[Path]:
    """The folders that a relative path may start from, in order."""
    if relative_to is not None:
        yield Path(relative_to)
    yield Path()


def _existing(name: str, relative_to: Path | None) -> Path | None:
    """The first place where the path exists, if any."""
    for home in _homes(relative_to):
        path = home / os.path.expanduser(name)
        try:
            if name and path.exists():
                return path
        except (OSError, ValueError):  # too long for a path, or holds a NUL
            return None
    return None


def _can_be_repo(name: str, relative_to: Path | None) -> bool:
    """Whether the Hub may know the name; not if its first part is a folder here, which makes it a path."""
    if not _REPO.fullmatch(name) or len(name) > 96:
        return False
    first, slash, _ = name.partition("/")
    return not (slash and any((home / first).is_dir() for home in _homes(relative_to)))


def _nearest(name: str, relative_to: Path | None) -> list[str]:
    """Up to three existing paths, written like ``name``, that differ from it by a slip."""
    parent, last = os.path.split(name.rstrip("/"))
    for home in _homes(relative_to):
        try:
            siblings = os.listdir(home / os.path.expanduser(parent))
        except (OSError, ValueError):
            continue
        near = difflib.get_close_matches(last, siblings, n=3, cutoff=0.75)
        if near:
            return [os.path.join(parent, sibling) for sibling in near]
    return []
