"""Folders of facts: named tensors with what they were measured from, kept in the cache under a digest of all that.

A folder appears under its name when it is complete. Until then it is made beside it, locked, with a list of the steps
that are done, so that whoever was killed goes on. A tensor in it is called after the tensor on disk that it speaks
of, a colon and the field: ``model.layers.0.mlp.down_proj.weight:gram``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import CheckpointError
from mergetool.storage.header import Entry, read_header
from mergetool.storage.reader import Reader

FORMAT = 2
"""Changes whenever the code makes other facts of the same data."""
ABOUT = "facts.json"
"""What the facts are and what they were measured from."""
STEPS = "steps.json"
"""What is done of a folder in the making."""


def digest(kind: str, made_of: Mapping[str, Any]) -> str:
    """The digest that facts of a kind are kept under.

    Args:
        kind: what is measured.
        made_of: what decides their values, as JSON: the sources' identities, the data's digest, the settings.
    """
    content = {"format": FORMAT, "kind": kind, "made_of": made_of}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Facts:
    """A finished folder of facts, for reading.

    Attributes:
        path: the folder.
        kind: what was measured.
        label: the models as they were named; where they are does not decide what their facts are.
        made_of: what it was measured from.
        aliases: name on disk → the name that the same facts are kept under.
        notes: what a reader should know.
        entries: every tensor by its full name: its file and its place there.
    """

    path: Path
    kind: str
    label: str
    made_of: Mapping[str, Any]
    aliases: Mapping[str, str]
    notes: tuple[str, ...]
    entries: Mapping[str, tuple[Path, Entry]] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors on disk that there are facts of, those that share others' too, sorted."""
        own = {name.rpartition(":")[0] for name in self.entries}
        return tuple(sorted(own | self.aliases.keys()))

    def fields(self, name: str) -> tuple[str, ...]:
        """What is known of a tensor on disk."""
        found = (key.rpartition(":") for key in self.entries)
        holder = self.aliases.get(name, name)
        return tuple(sorted({f for each, _, f in found if each == name or (each == holder and _is_shared(f))}))

    def get(self, name: str, fact: str) -> NDArray[Any]:
        """A fact of a tensor on disk.

        Raises:
            CheckpointError: there is no such fact, or its file is damaged.
        """
        path, entry = self.place(name, fact)
        with Reader(path) as reader:
            return reader.read(entry).reshape(entry.shape)

    def place(self, name: str, fact: str) -> tuple[Path, Entry]:
        """The file that holds a fact of a tensor on disk, and where in it.

        Raises:
            CheckpointError: there is no such fact.
        """
        key = f"{name}:{fact}"
        if key not in self.entries and _is_shared(fact):
            key = f"{self.aliases.get(name, name)}:{fact}"
        if key not in self.entries:
            raise CheckpointError(f"holds no `{fact}` of `{name}`", str(self.path))
        return self.entries[key]


def mapped(file: Path, entry: Entry) -> NDArray[Any]:
    """A tensor of a file without reading it; nobody keeps it in memory who does not look at it."""
    if not entry.size:
        return np.empty(entry.shape, entry.dtype.storage)
    mapped = np.memmap(file, entry.dtype.storage, "r", entry.start, entry.shape or (1,))
    return np.asarray(mapped).reshape(entry.shape)


def _is_shared(fact: str) -> bool:
    """Whether tensors with one input have a fact in common: only what is known of the input is."""
    return fact in ("gram", "count") or fact.startswith("input.")


def open_facts(path: Path) -> Facts:
    """Open a folder of facts.

    Raises:
        CheckpointError: it is none, is not complete, or is damaged.
    """
    try:
        about = json.loads((path / ABOUT).read_bytes())
        fields = {key: about[key] for key in ("kind", "label", "made_of", "aliases", "notes", "files")}
    except FileNotFoundError:
        unfinished = (path / STEPS).exists()
        what = "is not complete yet" if unfinished else f"is no folder of facts: it has no {ABOUT}"
        raise CheckpointError(what, str(path), "run what measures them" if unfinished else "") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"cannot be read: {error}", str(path / ABOUT), "remove the folder") from error
    entries = entries_of([path / file for file in fields.pop("files")])
    return Facts(path, notes=tuple(fields.pop("notes")), entries=entries, **fields)


def under(facts: Facts, prefix: str) -> Facts:
    """The facts whose names begin with a prefix, called by what follows it: one model's where a folder has several.

    Args:
        facts: a folder.
        prefix: such as ``0/``.
    """
    entries = {name.removeprefix(prefix): at for name, at in facts.entries.items() if name.startswith(prefix)}
    pairs = ((a.removeprefix(prefix), b.removeprefix(prefix)) for a, b in facts.aliases.items() if a.startswith(prefix))
    return replace(facts, entries=entries, aliases=dict(pairs))


def entries_of(files: Iterable[Path]) -> dict[str, tuple[Path, Entry]]:
    """Every tensor of some files by its full name: its file and its place there.

    Raises:
        CheckpointError: a file is damaged.
    """
    return {name: (file, entry) for file in files for name, entry in read_header(file).entries.items()}
