"""A model opened: its tensors by name and place, its config, its other files; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergetool.checkpoint import hub
from mergetool.checkpoint.layout import companions
from mergetool.checkpoint.locate import Location, locate
from mergetool.checkpoint.quantized import quantization
from mergetool.checkpoint.sources import LocalFolder, RemoteRepo, Source
from mergetool.checkpoint.weights import read_weights
from mergetool.errors import CheckpointError
from mergetool.storage.dtypes import DType
from mergetool.storage.header import Header

_DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor of a checkpoint and where its bytes are.

    Attributes:
        name: its name on disk.
        dtype: the type of its elements.
        shape: its axes; ``()`` for a scalar.
        file: the weight file that holds it, relative to the checkpoint.
        start: the offset of its first byte from the start of that file.
        nbytes: the number of its bytes.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def size(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model whose headers and config are known and whose weights stay on disk, or on the Hub.

    Attributes:
        label: the model as the recipe wrote it.
        path: the local folder; None while the weights are only on the Hub.
        repo: ``org/name`` on the Hub, None for a local model.
        commit: the commit that the revision meant when the checkpoint was opened.
        config: ``config.json``, empty if there is none.
        tensors: every tensor that the weight files hold, in the order of the files and of the bytes in them.
        files: the files worth carrying into a merged model, relative, sorted.
        weight_files: the files that hold the tensors, relative, sorted.
        headers: the header of each weight file, for a reader to check the file against.
    """

    label: str
    path: Path | None
    repo: str | None
    commit: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef] = field(repr=False)
    files: tuple[str, ...]
    weight_files: tuple[str, ...]
    headers: Mapping[str, Header] = field(repr=False, default_factory=dict)

    @property
    def is_remote(self) -> bool:
        """Whether the weights are still to be fetched from the Hub."""
        return self.path is None

    def file(self, relative: str) -> Path:
        """The local path of one of the checkpoint's files.

        Raises:
            CheckpointError: the checkpoint is on the Hub and nothing of it has been fetched.
        """
        if self.path is None:
            raise CheckpointError(f"{relative} has not been fetched from the Hub", where=self.label)
        return self.path / relative

    def companion(self, relative: str) -> bytes | None:
        """The content of one of :attr:`files`, or None if the checkpoint has no such file.

        Raises:
            CheckpointError: it exists and cannot be read or fetched.
        """
        if relative not in self.files:
            return None
        return self._source().read(relative)

    def _source(self) -> Source:
        if self.repo is not None and self.commit is not None:
            return RemoteRepo(self.label, self.repo, self.commit, {})
        assert self.path is not None  # a checkpoint without a repo is local
        return LocalFolder(self.label, self.path)


def open_checkpoint(reference: str, relative_to: Path | None = None) -> Checkpoint:
    """Open the model that ``reference`` names: headers and configs are read, weights are not.

    A branch or tag of a Hub repo is resolved to a commit here, once; everything after asks for that commit.

    Args:
        reference: a local folder, a ``.safetensors`` file, or ``org/name[@revision]`` on the Hub.
        relative_to: the folder that relative paths start from, usually the recipe's.

    Raises:
        CheckpointError: the model cannot be found, is damaged, quantised or an adapter; every problem of its
            files is reported at once.
    """
    location = locate(reference, relative_to)
    source, commit, start = _source(location)
    names = source.names()
    config = _config(source) if "config.json" in names else {}
    weights = read_weights(source, start)
    tensors = {
        entry.name: TensorRef(entry.name, entry.dtype, entry.shape, file, entry.start, entry.nbytes)
        for file, header in weights.items()
        for entry in header.entries.values()
    }
    _refuse_quantised(reference, config, tensors)
    # A file named by itself may lie among strangers; only a config says that its folder is a model's.
    beside = companions(names) if start is None or "config.json" in names else ()
    return Checkpoint(
        label=reference,
        path=source.folder,
        repo=location.repo,
        commit=commit,
        config=config,
        tensors=MappingProxyType(tensors),
        files=beside,
        weight_files=tuple(weights),
        headers=MappingProxyType(weights),
    )


def fetch(checkpoint: Checkpoint, files: Iterable[str]) -> Checkpoint:
    """Download ``files`` (relative names) of a checkpoint on the Hub, and only those.

    Returns:
        The checkpoint with its local path. A checkpoint that is local already comes back as it is.

    Raises:
        CheckpointError: a file cannot be fetched.
    """
    wanted = sorted(set(files))
    if not checkpoint.is_remote or not wanted:
        return checkpoint
    repo, commit = checkpoint.repo, checkpoint.commit
    assert repo is not None  # a remote checkpoint has both
    assert commit is not None
    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        paths = list(pool.map(lambda name: hub.download(repo, commit, name), wanted))
    # Every path is the snapshot's folder followed by the file's relative name.
    snapshot = paths[0].parents[wanted[0].count("/")]
    return replace(checkpoint, path=snapshot)


def _source(location: Location) -> tuple[Source, str | None, str | None]:
    """The files at a location, the commit if they are a repo's, and the weight file if one was named."""
    label = location.label
    if location.repo is not None:
        found = hub.listing(location.repo, location.revision)
        if found.folder is not None:
            absent = "is not in the cache, and the Hub cannot be reached"
            return LocalFolder(label, found.folder, absent), found.commit, None
        return RemoteRepo(label, location.repo, found.commit, found.sizes), found.commit, None
    assert location.path is not None  # a location without a repo is local
    if location.path.is_dir():
        return LocalFolder(label, location.path), None, None
    return LocalFolder(label, location.path.parent), None, location.path.name


def _config(source: Source) -> dict[str, Any]:
    try:
        config = json.loads(source.read("config.json"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", f"{source.label}: config.json", "download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", f"{source.label}: config.json", "download it again")
    return config


def _refuse_quantised(label: str, config: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> None:
    scheme = quantization(config, tensors.keys())
    if scheme is not None:
        raise CheckpointError(
            f"is quantised ({scheme}); quantised weights cannot be merged",
            where=label,
            fix="name the 16-bit release of this model (often the same name without the suffix, or -BF16)",
        )
