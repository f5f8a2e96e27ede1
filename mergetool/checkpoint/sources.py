"""Where a checkpoint's files are: a local folder or a Hub repo at a commit, asked the same questions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mergetool.checkpoint import hub
from mergetool.errors import CheckpointError
from mergetool.storage.header import Header, parse, read_header
from mergetool.storage.preamble import preamble_size

# Of a thousand popular models all but a few have a header below this, so one request reads it.
_FIRST_BYTES = 128 << 10


class Source(Protocol):
    """A set of named files."""

    @property
    def label(self) -> str:
        """The model as the recipe wrote it."""

    @property
    def folder(self) -> Path | None:
        """Where the files are on this disk, if they are."""

    @property
    def absent(self) -> str:
        """What is to be said of a file that should be there and is not."""

    def names(self) -> frozenset[str]:
        """The relative names of the files, with ``/``."""

    def read(self, name: str) -> bytes:
        """The content of a small file."""

    def header(self, name: str) -> Header:
        """The header of a weight file."""


@dataclass(frozen=True)
class LocalFolder:
    """The files of a folder and of the folders directly in it."""

    label: str
    folder: Path
    absent: str = "is missing"

    def names(self) -> frozenset[str]:
        """The files that exist; a link that leads nowhere does not."""
        found = set()
        for entry in _scan(self.folder, self.label):
            if entry.is_file():
                found.add(entry.name)
            elif entry.is_dir() and not entry.name.startswith("."):
                inner = _scan(Path(entry.path), self.label)
                found.update(f"{entry.name}/{file.name}" for file in inner if file.is_file())
        return frozenset(found)

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror or error}", where=str(self.folder / name)
            ) from error

    def header(self, name: str) -> Header:
        """The header of a weight file."""
        return read_header(self.folder / name)


@dataclass(frozen=True)
class RemoteRepo:
    """The files of a Hub repo at a commit, with their sizes as the Hub lists them."""

    label: str
    repo: str
    commit: str
    sizes: Mapping[str, int | None]
    folder: None = None
    absent: str = "is not in the repo"

    def names(self) -> frozenset[str]:
        """The files that the Hub lists."""
        return frozenset(self.sizes)

    def read(self, name: str) -> bytes:
        """The content of a small file, fetched through the cache."""
        return hub.small_file(self.repo, self.commit, name)

    def header(self, name: str) -> Header:
        """The header of a weight file: from the cache if it is there, else its first bytes are fetched."""
        cached = hub.cached_file(self.repo, self.commit, name)
        if cached is not None:
            return read_header(cached)
        size = self.sizes[name]
        where = f"{self.label}: {name}"
        if size is None:
            raise CheckpointError("the Hub does not say how large this file is", where)
        first = self._bytes(name, 0, min(_FIRST_BYTES, size))
        start = preamble_size(first[:8], size, where)
        if start > len(first):
            first += self._bytes(name, len(first), start)
        return parse(first[8:start], start, size, where)

    def _bytes(self, name: str, start: int, stop: int) -> bytes:
        """The bytes ``[start, stop)`` of a file, all of them."""
        got = hub.read_range(self.repo, self.commit, name, start, stop)
        if len(got) < stop - start:
            raise CheckpointError(
                f"the Hub sent {len(got)} bytes of {stop - start}", f"{self.label}: {name}", "try again"
            )
        return got


def _scan(folder: Path, label: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(f"cannot be listed: {error.strerror or error}", where=label) from error
