"""The files that a recipe's calibration names: whether they are there, and what tells their content from others'."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path as File

from mergetool.errors import Problem
from mergetool.recipe.data import Data
from mergetool.recipe.recipe import Recipe
from mergetool.recipe.spelling import nearest
from mergetool.recipe.tree import Path


def absent(recipe: Recipe) -> list[Problem]:
    """What is wrong with the files of a recipe's data and with its adapter, as far as shows without reading them."""
    calibration = recipe.calibration
    if calibration is None:
        return []
    found: list[tuple[Path, str, File | None]] = [
        (("calibration", "data", data.name), data.path, data.file(recipe.folder)) for data in calibration.data
    ]
    if calibration.adapter is not None:
        adapter = calibration.adapter_file(recipe.folder)
        found.append((("calibration", "adapter"), calibration.adapter, adapter))
    return [
        problem
        for path, written, file in found
        if file is not None
        and (problem := fault(file, written, recipe.where(*path), calibration.adapter in (None, written))) is not None
    ]


def fault(file: File, written: str, where: str, only_files: bool = True) -> Problem | None:
    """What is wrong with a path, if anything.

    Args:
        file: the path.
        written: the path as the recipe has it.
        where: the place of the problem.
        only_files: whether a folder is wrong.
    """
    try:
        if file.is_file() or (file.is_dir() and not only_files):
            return None
        if file.exists():
            return Problem(f"{written} is no file", where, "name a file")
        near = nearest(file.name, sorted(path.name for path in file.parent.iterdir())[:200])
    except (OSError, ValueError):
        near = None
    fix = f"did you mean `{near}`?" if near else "paths are relative to the recipe's folder"
    return Problem(f"there is no file {written}", where, fix)


def fingerprint(data: Data, folder: File | None = None, seed: int = 0, adapter: File | None = None) -> str:
    """A digest of what decides the samples but for the tokenizer: the bytes of the files, the settings and the seed.

    Of a data set on the Hub it is the reference that counts, so one that is to stay the same needs a revision.

    Args:
        data: the data; neither their name nor the place of the file matters.
        folder: what a relative path starts from.
        seed: what the choice of samples begins with.
        adapter: the file of the adapter that reads them.

    Raises:
        CheckpointError: a file cannot be opened.
        RunError: the disk fails.
    """
    from mergetool.storage.digest import file_digest

    file = data.file(folder)
    content = [data.path] if file is None else [[name, file_digest(path)] for name, path in _files(file)]
    code = None if adapter is None else file_digest(adapter)
    settings = [data.format, data.samples, data.max_length, data.column, seed, code]
    return hashlib.sha256(json.dumps([content, settings]).encode()).hexdigest()


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """The fingerprint of each of a recipe's data, by name.

    Raises:
        CheckpointError: a file cannot be opened.
        RunError: the disk fails.
    """
    calibration = recipe.calibration
    if calibration is None:
        return {}
    adapter = calibration.adapter_file(recipe.folder)
    return {data.name: fingerprint(data, recipe.folder, recipe.seed, adapter) for data in calibration.data}


def _files(place: File) -> Iterator[tuple[str, File]]:
    """A file, or all the files in a folder, each with its name from there."""
    if not place.is_dir():
        yield "", place
        return
    for path in sorted(place.rglob("*")):
        if path.is_file():
            yield path.relative_to(place).as_posix(), path
