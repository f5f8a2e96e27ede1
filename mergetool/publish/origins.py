"""What a source's own card says about it: its place on the Hub and its licence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import yaml

from mergetool.checkpoint import hub
from mergetool.checkpoint.checkpoint import Checkpoint
from mergetool.errors import CheckpointError
from mergetool.plan import Source

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Trainers leave the folder they started from in `_name_or_path`; these are no one's name on the Hub.
_FOLDERS = re.compile(r"(model|checkpoint|ckpt|output|out|result|run|weight|data|tmp)s?", re.IGNORECASE)
_LARGEST = 1 << 20  # bytes; a longer card is not read
_LICENCE = ("license", "license_name", "license_link")


def hub_ids(sources: tuple[Source, ...]) -> list[str]:
    """The names on the Hub of the models that went in, each once, in the recipe's order.

    A local folder is named by the ``base_model`` of its own card, or by the ``_name_or_path`` of its config; one
    that has neither is left out.
    """
    return list(dict.fromkeys(name for source in sources for name in _names(source.checkpoint)))


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.repo is not None:
        yield checkpoint.repo
        return
    said = front_matter(_readme(checkpoint)).get("base_model")
    found = [name for name in (said if isinstance(said, list) else [said]) if _is_hub_id(name)]
    path = checkpoint.config.get("_name_or_path")
    yield from found or ([path] if _is_hub_id(path) else [])


def _is_hub_id(name: object) -> TypeGuard[str]:
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or len(name) > 96:
        return False
    return not _FOLDERS.fullmatch(name.partition("/")[0])


def licence(sources: tuple[Source, ...]) -> Mapping[str, str]:
    """The front matter's entries on the licence when all sources' cards say the same, else nothing."""
    said = []
    for source in sources:
        matter = front_matter(_readme(source.checkpoint))
        said.append({key: matter[key] for key in _LICENCE if isinstance(matter.get(key), str)})
    agreed = bool(said) and all(entry == said[0] for entry in said) and "license" in said[0]
    return said[0] if agreed else {}


def front_matter(readme: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; empty where there is none, or none that can be read."""
    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", readme, re.DOTALL | re.MULTILINE)
    if not found:
        return {}
    try:
        matter = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return matter if isinstance(matter, dict) else {}


def _readme(checkpoint: Checkpoint) -> str:
    """The source's card; empty where it has none."""
    if checkpoint.repo is not None and checkpoint.commit is not None:
        return _remote_readme(checkpoint.repo, checkpoint.commit)
    try:
        with checkpoint.file("README.md").open("rb") as file:
            content = file.read(_LARGEST + 1)
    except (OSError, CheckpointError):
        return ""
    return _text(content)


def _remote_readme(repo: str, commit: str) -> str:
    try:
        return _text(hub.small_file(repo, commit, "README.md"))
    except CheckpointError:  # a card that cannot be had is no reason to fail a merge that is done
        return ""


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig", "replace") if len(content) <= _LARGEST else ""
