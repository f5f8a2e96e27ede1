"""A folder of facts in the making: one process at a time, step by step, gone on with after a kill."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.cache import cache_folder
from mergetool.errors import OutputRefused
from mergetool.execute.fact_folder import ABOUT, FORMAT, STEPS, Facts, digest, entries_of, open_facts
from mergetool.execute.locks import waiting
from mergetool.storage import system
from mergetool.storage.dtypes import DTYPES, DType
from mergetool.storage.shards import shard
from mergetool.storage.writer import Writer, atomic_write

_DTYPES = {DTYPES[name].storage: DTYPES[name] for name in ("F32", "F64", "I64", "I32")}


class Making:
    """A folder of facts that is being made.

    Attributes:
        path: where it is made.
        steps: what is done so far: the name of each step and the file of its facts.
        aliases: names on disk that share others' facts.
        seen: the names on disk that anything is known of.
    """

    def __init__(self, path: Path, kind: str, made_of: Mapping[str, Any], label: str) -> None:
        self.path, self.kind, self.made_of, self.label = path, kind, made_of, label
        done = _read_steps(path / STEPS)
        self.steps: dict[str, str] = done.get("steps", {})
        self.aliases: dict[str, str] = done.get("aliases", {})
        self.seen: set[str] = set(done.get("seen", ()))

    def add(
        self, step: str, tensors: Mapping[str, NDArray[Any]], aliases: Mapping[str, str], seen: Iterable[str] = ()
    ) -> None:
        """Write the facts of a step and note that it is done.

        Args:
            step: its name.
            tensors: float32 and float64 arrays by their full names.
            aliases: names on disk that share others' facts.
            seen: the names on disk that anything is known of.

        Raises:
            RunError: the disk is full or fails.
        """
        # A step that was done and is done again, for whoever was killed before the end began anew, keeps its file.
        file = self.steps.get(step, f"{len(self.steps):04d}.safetensors")
        layout = [(name, _dtype(array), array.shape) for name, array in tensors.items()]
        (part,) = shard(layout, 1 << 62, Path(file).stem)
        with Writer(self.path / file, part) as writer:
            for entry in part.header.entries.values():
                writer.write(np.ascontiguousarray(tensors[entry.name]), entry.start)
            writer.sync()
        self.steps[step] = file
        self.aliases.update(aliases)
        self.seen.update(seen)
        done = {"steps": self.steps, "aliases": self.aliases, "seen": sorted(self.seen)}
        atomic_write(self.path / STEPS, json.dumps(done))

    @property
    def done(self) -> Facts:
        """What is known so far, for reading.

        Raises:
            CheckpointError: a file is damaged.
        """
        entries = entries_of(self.path / file for file in self.steps.values())
        return Facts(self.path, self.kind, self.label, self.made_of, self.aliases, (), entries)

    def restart(self) -> None:
        """Forget all that is done."""
        self.steps, self.aliases, self.seen = {}, {}, set()
        for item in self.path.iterdir():
            _remove(item)

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, notes: tuple[str, ...] = (), beside: Iterable[str] = ()) -> Facts:
        """Give the folder its name.

        Args:
            notes: what a reader should know.
            beside: files that are kept although they hold no facts.

        Raises:
            RunError: the disk is full or fails.
        """
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "label": self.label,
            "made_of": self.made_of,
            "aliases": dict(sorted(self.aliases.items())),
            "notes": notes,
            "files": [file for _, file in sorted(self.steps.items(), key=lambda step: step[1])],
        }
        atomic_write(self.path / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))
        kept = {ABOUT, *self.steps.values(), *beside}
        final = self.path.with_name(self.path.name.removeprefix(".").removesuffix(".partial"))
        try:
            for item in self.path.iterdir():
                if item.name not in kept:
                    _remove(item)
            _remove(final)  # what stands there is not complete
            system.rename(self.path, final)
            system.sync_folder(final.parent)
        except OSError as error:
            raise system.write_failure(error, final) from error
        return open_facts(final)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_steps(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _dtype(array: NDArray[Any]) -> DType:
    return _DTYPES[array.dtype.newbyteorder("<")]


@contextlib.contextmanager
def facts_folder(
    kind: str, made_of: Mapping[str, Any], root: Path | None = None, label: str = ""
) -> Iterator[Facts | Making]:
    """The folder of such facts: finished, or to be made by the caller alone; others wait meanwhile.

    Args:
        kind: what is measured; the first part of the folder's name.
        made_of: what decides their values, as JSON.
        root: where such folders are; the cache by default.
        label: the models as they are named, for people.

    Raises:
        OutputRefused: the cache cannot be written.
        CheckpointError: the finished folder is damaged.
    """
    root = cache_folder("facts") if root is None else root
    final = root / f"{kind}-{digest(kind, made_of)}"
    partial, lock = (root / f".{final.name}.{ending}" for ending in ("partial", "lock"))
    with contextlib.ExitStack() as held:
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not (final / ABOUT).exists():
                held.enter_context(waiting(lock))
                partial.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputRefused(
                f"cannot be written: {error.strerror or error}",
                str(root),
                "set MERGETOOL_CACHE to a folder that can be",
            ) from error
        if (final / ABOUT).exists():  # perhaps made while this process waited
            shutil.rmtree(partial, ignore_errors=True)
            yield open_facts(final)
        else:
            yield Making(partial, kind, made_of, label)
        if (final / ABOUT).exists():  # nobody needs the lock any more: whoever has it open will find the facts
            lock.unlink(missing_ok=True)
