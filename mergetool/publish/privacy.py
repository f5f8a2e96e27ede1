"""Text for publication: absolute paths of the user's machine shortened to their last part."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from mergetool.checkpoint.checkpoint import Checkpoint
from mergetool.plan import Plan, Source

# An absolute path of two parts or more, where a word may begin: so neither a URL's nor a glob's slashes.
_PATH = re.compile(r"(?:^|(?<=[\s\"'`=:(\[{,<]))~?/(?!/)(?:[^\s/\"'`<>|,;:)\]}]+/)+[^\s/\"'`<>|,;:)\]}]*", re.MULTILINE)


@dataclass(frozen=True)
class Privacy:
    """Takes paths out of text; those of the sources are known exactly, whatever signs they hold."""

    known: tuple[str, ...]
    """Absolute paths, the longest first."""
    home: str
    """The recipe's folder: what is in it is named from there."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What each source is called in public, by what the recipe calls it."""

    @classmethod
    def of(cls, plan: Plan) -> Privacy:
        """The paths that a plan knows of."""
        paths = {source.label for source in plan.sources}
        paths |= {str(source.checkpoint.path) for source in plan.sources if source.checkpoint.path}
        paths |= {str(path) for path in (plan.recipe.output, plan.output) if path}
        absolute = {path.rstrip("/") for path in paths if path.startswith(("/", "~"))}
        home = str(plan.recipe.folder) if plan.recipe.folder else ""
        known = sorted(absolute - {""}, key=lambda path: (-len(path), path))
        return cls(tuple(known), home.rstrip("/"), _names(plan.sources))

    def hide(self, text: str) -> str:
        """The text with every absolute path shortened to its last part."""
        for path in self.known:
            text = re.sub(rf"(?<![\w./]){re.escape(path)}(?![\w-])", _escaped_name(path), text)
        if self.home.startswith("/"):
            text = text.replace(self.home + "/", "")
        return _PATH.sub(lambda found: last_part(found[0]), text)

    def hide_in(self, data: Any) -> Any:
        """Plain data with its sources called as in public, and :meth:`hide` done to every other text."""
        if isinstance(data, str):
            return self.names.get(data) or self.hide(data)
        if isinstance(data, Mapping):
            return {self.hide_in(key): self.hide_in(value) for key, value in data.items()}
        return [self.hide_in(item) for item in data] if isinstance(data, list) else data


def _names(sources: Sequence[Source]) -> dict[str, str]:
    """A name for each source that says nothing of where it is; numbered where two folders have the same."""
    names: dict[str, str] = {}
    for source in sources:
        checkpoint = source.checkpoint
        name = source.label if checkpoint.repo is not None else folder_name(checkpoint)
        alike, number = name, 1
        while name in names.values():
            number += 1
            name = f"{alike} ({number})"
        names[source.label] = name
    return names


def folder_name(checkpoint: Checkpoint) -> str:
    """What a local source's folder is called; never where it is."""
    return last_part(checkpoint.label) or last_part(os.path.abspath(checkpoint.path or "model"))


def last_part(path: str) -> str:
    """The last part of a path, whether of a folder or a file; empty where it names none, as in ``..``."""
    name = PurePosixPath(os.path.normpath(path)).name
    return "" if name == ".." else name


def _escaped_name(path: str) -> str:
    return last_part(path).replace("\\", r"\\")
