"""Whether a folder may be the output, as far as paths can tell; nothing is looked at but what stands where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mergetool.errors import Problem
from mergetool.plan.work import Source


def refusal(output: Path, sources: Sequence[Source], beside: Iterable[Path] = ()) -> Problem | None:
    """What forbids an output: it is, holds or lies in a source, or something that is no folder stands there.

    Args:
        output: the folder to make.
        sources: what must not be written to.
        beside: further places that are written on the way.
    """
    for source in sources:
        folder = source.checkpoint.path
        for place in (output, *beside):
            if folder is not None and _overlap(folder.resolve(), place.resolve()):
                return Problem(f"is where the source {source.label} lies", str(place), "choose another output")
    if output.is_symlink():
        return Problem("is a link", str(output), "name the folder itself, or remove the link")
    if output.exists() and not output.is_dir():
        return Problem("exists and is no folder", str(output), "choose another output")
    return None


def _overlap(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents or path in folder.parents
