"""The header of a safetensors file: read with suspicion, or laid out ahead of the data.

A file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' bytes without a hole.
The JSON maps each name to ``{"dtype", "shape", "data_offsets"}``, and may map ``"__metadata__"`` to strings.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergetool.errors import CheckpointError, HeaderError, Problem
from mergetool.storage import system
from mergetool.storage.density import refuse_dense
from mergetool.storage.dtypes import DTYPES, DType
from mergetool.storage.preamble import LARGEST_HEADER, preamble_size, truncated
from mergetool.storage.strict import parse_object, shown

_METADATA = "__metadata__"
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_MOST_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: the tensor's name.
        dtype: the type of its elements.
        shape: its axes; ``()`` for a scalar.
        start: the offset of its first byte from the start of the *file*.
        stop: the offset behind its last byte.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The number of its bytes."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds.

    Attributes:
        entries: the tensors by name, in the order of their bytes.
        metadata: the strings under ``__metadata__``.
        data_start: the offset of the first tensor's first byte.
        file_size: the number of bytes of the file.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


def parse(raw_json: bytes | bytearray, data_start: int, file_size: int, where: str) -> Header:
    """Check the JSON of a header in full and turn it into a :class:`Header`.

    Args:
        raw_json: the JSON, with the spaces that may pad it.
        data_start: the offset of the data in the file, ``8 + len(raw_json)``.
        file_size: the number of bytes of the file.
        where: the path, for messages.

    Raises:
        HeaderError: the header breaks the format, or the file is shorter or longer than it says.
    """
    refuse_dense(raw_json, where)
    document = parse_object(raw_json, where)
    problems: list[str] = []
    metadata = _metadata(document.pop(_METADATA, {}), problems)
    entries: list[Entry] = []
    for name, fields in document.items():
        try:
            entries.append(_entry(name, fields, data_start))
        except HeaderError as error:
            problems += [f"tensor {shown(name)}: {problem.what}" for problem in error.problems]
            if len(problems) > _MOST_PROBLEMS:
                break
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    if not problems:
        problems += _gaps(entries, data_start)
    if problems:
        raise HeaderError(Problem(what, where, "download the file again") for what in problems[:_MOST_PROBLEMS])
    end = entries[-1].stop if entries else data_start
    if file_size < end:
        raise truncated(file_size, str(end), where)
    if file_size > end:
        raise HeaderError(
            f"has {file_size - end} bytes after its last tensor: {file_size} bytes, {end} expected",
            where,
            "download it again",
        )
    return Header(MappingProxyType({entry.name: entry for entry in entries}), metadata, data_start, file_size)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the file at ``path``; no tensor is read.

    Raises:
        CheckpointError: the file cannot be opened.
        HeaderError: the file breaks the format.
        RunError: the disk fails.
    """
    path = Path(path)
    fd = open_source(path)
    try:
        size = os.fstat(fd).st_size
        first = bytearray(min(8, size))
        count = system.read_all(fd, first, 0)
        start = preamble_size(bytes(first[:count]), size, str(path))
        raw = bytearray(start - 8)
        if system.read_all(fd, raw, 8) < len(raw):
            raise truncated(size, f"at least {start}", str(path))
    except OSError as error:
        raise system.read_failure(error, path) from error
    finally:
        system.drop(fd)
    return parse(raw, start, size, str(path))


def open_source(path: Path) -> int:
    """A descriptor to read the file at ``path``; a :class:`CheckpointError` where there is no such file."""
    try:
        # O_NONBLOCK: opening a pipe would wait for a writer; for a file it changes nothing.
        fd = system.open_file(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointError("no such file", where=str(path)) from error
    except OSError as error:
        raise CheckpointError(f"cannot be opened: {error.strerror or error}", where=str(path)) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        system.drop(fd)
        raise CheckpointError("is not a file", where=str(path))
    return fd


def lay_out(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[Header, bytes]:
    """The header of a file that holds ``tensors`` one behind another, and the exact bytes before its data.

    The same arguments give the same bytes. The JSON is padded with spaces so that the data begin on a page: they can
    be written past the page cache, and mapped into memory as they are.

    Args:
        tensors: name, dtype and shape of each, in the order of their bytes.
        metadata: the strings to put under ``__metadata__``.

    Returns:
        The header, and the 8-byte length followed by the JSON.

    Raises:
        HeaderError: a name comes twice or cannot be written, or the header outgrows the format's limit.
    """
    document: dict[str, Any] = {}
    if metadata:
        document[_METADATA] = dict(sorted(metadata.items()))
    placed: list[tuple[str, DType, tuple[int, ...], int, int]] = []
    start = 0
    for name, dtype, shape in tensors:
        if name in document or name == _METADATA:
            raise HeaderError(f"the tensor name {shown(name)} is taken")
        stop = start + dtype.nbytes(shape)
        document[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [start, stop]}
        placed.append((name, dtype, shape, start, stop))
        start = stop
    try:
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise HeaderError(f"a name is not valid Unicode: {error}") from error
    text += b" " * (-(8 + len(text)) % system.PAGE)
    if len(text) > LARGEST_HEADER:
        raise HeaderError(f"the header would have {len(text):,} bytes, over the limit of {LARGEST_HEADER:,}")
    base = 8 + len(text)
    entries = {name: Entry(name, dtype, shape, base + a, base + b) for name, dtype, shape, a, b in placed}
    header = Header(MappingProxyType(entries), MappingProxyType(dict(metadata or {})), base, base + start)
    return header, struct.pack("<Q", len(text)) + text


def _metadata(found: Any, problems: list[str]) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        problems.append(f"{_METADATA} must map strings to strings")
        return {}
    try:
        for text in (*found, *found.values()):
            if not text.isascii():
                text.encode()
    except UnicodeEncodeError:
        problems.append(f"{_METADATA} is not valid Unicode")
        return {}
    return MappingProxyType(found)


def _entry(name: str, fields: Any, data_start: int) -> Entry:
    """One tensor's entry, every field checked."""
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise HeaderError("needs exactly dtype, shape and data_offsets")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise HeaderError("the name is not valid Unicode") from None
    spelling, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype = DTYPES.get(spelling) if isinstance(spelling, str) else None
    if dtype is None:
        raise HeaderError(f"unknown dtype {shown(spelling)}")
    if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
        raise HeaderError("its shape must be a list of whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise HeaderError("its data_offsets must be two whole numbers")
    begin, end = offsets
    # type() and not isinstance(): true and false are ints to isinstance
    if type(begin) is not int or type(end) is not int or begin < 0 or end < begin:
        raise HeaderError("its data_offsets must be two whole numbers, the second not below the first")
    nbytes = dtype.nbytes(tuple(shape))
    if nbytes != end - begin:
        raise HeaderError(
            f"{dtype.name} {shown(shape)} takes {nbytes} bytes, but its data_offsets {shown(offsets)} span "
            f"{shown(end - begin)}"
        )
    return Entry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def _gaps(entries: list[Entry], data_start: int) -> list[str]:
    """Where sorted entries leave a hole or overlap, counted from the start of the data."""
    problems = []
    at = data_start
    for entry in entries:
        if entry.start != at:
            what = "leaves a hole before" if entry.start > at else "overlaps another tensor at"
            place = shown(min(entry.start, at) - data_start)
            problems.append(f"tensor {shown(entry.name)}: {what} byte {place} of the data")
            if len(problems) == _MOST_PROBLEMS:
                break
        at = max(at, entry.stop)
    return problems
