"""The headers of a checkpoint's weight files, checked against one another and against their index."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from mergetool.checkpoint.layout import weight_file
from mergetool.checkpoint.sources import Source
from mergetool.errors import CheckpointError, Problem
from mergetool.storage.header import Header
from mergetool.storage.strict import parse_object

_AT_ONCE = 8  # a header is one short request to the Hub; more at once brings rate limits, not speed
_NAMES_SHOWN = 5


def read_weights(source: Source, start: str | None = None) -> dict[str, Header]:
    """The header of every weight file of ``source`` by the file's name, sorted.

    Args:
        source: where the files are.
        start: the ``.safetensors`` or ``.index.json`` file to start from; chosen by its name if None.

    Raises:
        CheckpointError: there is no such file, a file is damaged or missing, or index and files disagree.
    """
    names = source.names()
    if start is None:
        start = weight_file(names, source.label)
    if start.endswith(".safetensors.index.json"):
        index = _read_index(source, start)
        files = sorted(set(index.values()))
        missing = [Problem(source.absent, _place(source, file)) for file in files if file not in names]
        if missing:
            raise CheckpointError(missing)
        headers = _read_headers(source, files)
        _agree(source, start, index, headers)
        return headers
    if start.endswith(".safetensors") and not start.startswith("adapter_model"):
        return _read_headers(source, [start])
    weight_file([start], source.label)  # says what to do about an adapter, a pickle or a GGUF file
    raise CheckpointError("is not a safetensors file", where=_place(source, start))


def _read_headers(source: Source, files: Collection[str]) -> dict[str, Header]:
    """Every file's header; the problems of all files in one error."""
    headers: dict[str, Header] = {}
    problems: list[Problem] = []
    kind = CheckpointError

    def read(file: str) -> Header | CheckpointError:
        try:
            return source.header(file)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(_AT_ONCE if source.folder is None else 1) as pool:
        for file, found in zip(files, pool.map(read, files), strict=True):
            if isinstance(found, CheckpointError):
                problems += found.problems
                kind = type(found)
            else:
                headers[file] = found
    if problems:
        raise kind(problems)
    return headers


def _read_index(source: Source, name: str) -> dict[str, str]:
    """The ``weight_map`` of an index file, every value a ``.safetensors`` file below the folder."""
    where = _place(source, name)
    found = parse_object(source.read(name), where).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError("has no weight_map of names to files", where, "download it again")
    for file in sorted(set(found.values())):
        path = PurePosixPath(file)
        # An index must not lead out of its folder.
        if path.is_absolute() or ".." in path.parts or "\\" in file or path.suffix != ".safetensors":
            raise CheckpointError(f"lists {file!r}, which is not a safetensors file in this folder", where)
    return found


def _agree(source: Source, index_name: str, index: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Every tensor stands in exactly the file that the index names for it, and the index names them all."""
    problems: list[Problem] = []
    listed: dict[str, set[str]] = {file: set() for file in headers}
    for tensor, file in index.items():
        listed[file].add(tensor)
    holders: dict[str, str] = {}
    for file, header in headers.items():
        absent = listed[file] - header.entries.keys()
        extra = [tensor for tensor in header.entries if index.get(tensor) != file]
        twice = [tensor for tensor in header.entries if tensor in holders]
        for tensors, what in (
            (sorted(absent), f"lacks what {index_name} says it holds"),
            (extra, f"holds what {index_name} does not say it holds"),
            (twice, f"holds what {holders[twice[0]] if twice else ''} also holds"),
        ):
            if tensors:
                fix = "file and index are from different saves: download both again"
                problems.append(Problem(f"{what}: {_some(tensors)}", _place(source, file), fix))
        holders.update(dict.fromkeys(header.entries, file))
    if problems:
        raise CheckpointError(problems)


def _some(names: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    every = list(names)
    more = len(every) - _NAMES_SHOWN
    return ", ".join(every[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _place(source: Source, name: str) -> str:
    return f"{source.label}: {name}"
