"""Text for publication: absolute paths of the user's machine shortened to their last part."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from mergetool.plan import Plan

# An absolute path of two parts or more, where a word may begin: so neither a URL's nor a glob's slashes.
_PATH = re.compile(r"(?:^|(?<=[\s\"'`=:(\[{,<]))~?/(?!/)(?:[^\s/\"'`<>|,;:)\]}]+/)+[^\s/\"'`<>|,;:)\]}]*", re.MULTILINE)


@dataclass(frozen=True)
class Privacy:
    """Takes paths out of text; those of the sources are known exactly, whatever signs they hold."""

    known: tuple[str, ...]
    """Absolute paths, the longest first."""
    home: str
    """The recipe's folder: what is in it is named from there."""

    @classmethod
    def of(cls, plan: Plan) -> Privacy:
        """The paths that a plan knows of."""
        paths = {source.label for source in plan.sources}
        paths |= {str(source.checkpoint.path) for source in plan.sources if source.checkpoint.path}
        paths |= {str(path) for path in (plan.recipe.output, plan.output) if path}
        absolute = {path.rstrip("/") for path in paths if path.startswith(("/", "~"))}
        home = str(plan.recipe.folder) if plan.recipe.folder else ""
        return cls(tuple(sorted(absolute - {""}, key=lambda path: (-len(path), path))), home.rstrip("/"))

    def hide(self, text: str) -> str:
        """The text with every absolute path shortened to its last part."""
        for path in self.known:
            text = re.sub(rf"(?<![\w./]){re.escape(path)}(?![\w-])", _escaped_name(path), text)
        if self.home.startswith("/"):
            text = text.replace(self.home + "/", "")
        return _PATH.sub(lambda found: last_part(found[0]), text)


def last_part(path: str) -> str:
    """The last part of a path, whether of a folder or a file; empty where it names none, as in ``..``."""
    name = PurePosixPath(os.path.normpath(path)).name
    return "" if name == ".." else name


def _escaped_name(path: str) -> str:
    return last_part(path).replace("\\", r"\\")
