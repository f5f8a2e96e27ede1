"""A task's correction applied to the merged model it belongs to: to a loaded module, or to a folder as a new one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergetool.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergetool.errors import CheckpointError, OutputRefused, PlanError
from mergetool.execute.correct_facts import ABOUT
from mergetool.facts.correction import Edit
from mergetool.kernels.rounding import READABLE, narrow, widen
from mergetool.plan import SHARD_SIZE
from mergetool.publish import PROVENANCE, RECIPE
from mergetool.publish.config import with_changes
from mergetool.storage import system
from mergetool.storage.dtypes import DType
from mergetool.storage.header import Entry, read_header
from mergetool.storage.reader import Reader
from mergetool.storage.shards import index, shard
from mergetool.storage.writer import Writer, atomic_write

if TYPE_CHECKING:
    import torch

_TILE = 1 << 20
Path_ = str | os.PathLike[str]


@dataclass(frozen=True)
class _File:
    """What a file of corrections says.

    Attributes:
        edits: what becomes of each tensor of the model, by its name on disk.
        replaced: tensors that others take the place of, float64.
        added: biases that the model does not have, and their lengths.
        config: what changes in its config, for it to have them.
    """

    edits: Mapping[str, Edit]
    replaced: Mapping[str, NDArray[np.float64]]
    added: Mapping[str, int]
    config: Mapping[str, bool]

    @property
    def names(self) -> set[str]:
        """All tensors that change."""
        return self.edits.keys() | self.replaced.keys()

    def of(self, name: str, values: NDArray[np.float64], shape: tuple[int, ...], start: int = 0) -> None:
        """Make of a run of a tensor's coordinates what it should be, in place."""
        if name in self.replaced:
            values[...] = self.replaced[name].reshape(-1)[start : start + values.size]
        elif name in self.edits:
            self.edits[name].tile(values, shape, start)


def apply_correction(target: torch.nn.Module | Path_, file: Path_, output: Path_ | None = None) -> None:
    """Apply a task's correction, a file that ``fold: side_file`` or ``fold: head`` made, to its merged model.

    A module is changed where it is; a bias that it lacks is given to it. A folder is left as it is, and the corrected
    model is written to another. A correction goes onto the model as it was merged, once.

    >>> recipe = load("examples/tact.yaml", ["correct.fold=side_file", "correct.data=python"])
    >>> report = run(build(recipe), "merged")
    >>> apply_correction("merged", "merged/corrections/python.safetensors", "merged-python")

    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("merged")
    >>> apply_correction(model, "merged/corrections/python.safetensors")

    Args:
        target: the merged model, loaded with transformers or by code of your own; or its folder.
        file: ``corrections/TASK.safetensors`` or ``heads/TASK.safetensors``.
        output: the new folder, of a folder.

    Raises:
        CheckpointError: the file or the folder cannot be read, or the file holds no correction.
        PlanError: the model has no tensor of a name that is corrected, or one of another shape.
        OutputRefused: the new folder exists already.
        RunError: the disk is full or fails.
    """
    found = _read(Path(file))
    if isinstance(target, str | os.PathLike):
        if output is None:
            raise ValueError("name the new folder: apply_correction(folder, file, output)")
        return _to_folder(open_checkpoint(os.fspath(target)), found, Path(output))
    if output is not None:
        raise ValueError("a module is changed where it is; there is no output")
    return _to_module(target, found)


def _read(path: Path) -> _File:
    header = read_header(path)
    try:
        about = json.loads(header.metadata[ABOUT])
        axes, replaced = about.get("axes", {}), about.get("replaces", [])
    except (KeyError, ValueError, AttributeError):
        what = "holds no correction"
        raise CheckpointError(what, str(path), "name a file of `corrections/` or of `heads/`") from None
    with Reader(path, header) as reader:
        arrays = {
            name: widen(reader.read(entry), entry.dtype.name).reshape(entry.shape)
            for name, entry in header.entries.items()
        }
    edits = {name: Edit(axis, arrays.get(f"{name}:scale"), arrays.get(f"{name}:shift")) for name, axis in axes.items()}
    heads = {name: arrays[name] for name in replaced}
    return _File(edits, heads, about.get("added", {}), about.get("config", {}))


def _to_module(module: torch.nn.Module, found: _File) -> None:
    import torch

    places = {name: _place(module, name, found) for name in sorted(found.names)}
    for name, (owner, attribute) in places.items():
        tensor = getattr(owner, attribute)
        if tensor is None:
            like = owner.weight
            tensor = torch.zeros(found.added[name], dtype=like.dtype, device=like.device)
            owner.register_parameter(attribute, torch.nn.Parameter(tensor, requires_grad=like.requires_grad))
            tensor = getattr(owner, attribute)
        shape = tuple(tensor.shape)
        _fits(found, name, shape)
        values = tensor.detach().double().cpu().numpy().reshape(-1).copy()
        found.of(name, values, shape)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(values.reshape(shape)))


def _place(module: torch.nn.Module, name: str, found: _File) -> tuple[Any, str]:
    """The module and attribute of a tensor; transformers leaves a prefix out or puts one before it."""
    prefix = str(getattr(module, "base_model_prefix", ""))
    for each in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        path, _, attribute = each.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        if getattr(owner, attribute, None) is not None or (name in found.added and hasattr(owner, "weight")):
            return owner, attribute
    raise PlanError(f"has no `{name}`, which is corrected", type(module).__name__, "load the model that was merged")


def _fits(found: _File, name: str, shape: tuple[int, ...]) -> None:
    if name in found.replaced:
        wanted = found.replaced[name].shape
        if wanted != shape:
            raise PlanError(f"`{name}` is {list(shape)}, and the file has it as {list(wanted)}")
        return
    edit = found.edits[name]
    sizes = {len(vector) for vector in (edit.scale, edit.shift) if vector is not None}
    if len(shape) <= edit.axis or sizes != {shape[edit.axis]}:
        raise PlanError(f"`{name}` is {list(shape)}, and its correction is of {sorted(sizes)} units")


def _to_folder(checkpoint: Checkpoint, found: _File, output: Path) -> None:
    layout = list(_layout(checkpoint, found))
    names = {name for name, _, _ in layout}
    if missing := sorted(found.names - names):
        raise PlanError(f"has no `{missing[0]}`, which is corrected", checkpoint.label, "name the merged model")
    for name, dtype, shape in layout:
        if name in found.names:
            _fits(found, name, shape)
            if dtype.name not in READABLE:
                raise PlanError(f"`{name}` is {dtype.name}, which cannot be corrected", checkpoint.label)
    if output.exists():
        raise OutputRefused("exists already", str(output), "choose another output")
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shards = shard(layout, SHARD_SIZE)
        for part in shards:
            with Writer(partial / part.file, part) as writer:
                for entry in part.header.entries.values():
                    _write(checkpoint, found, entry, writer)
                writer.sync()
        if len(shards) > 1:
            atomic_write(partial / "model.safetensors.index.json", json.dumps(index(shards), indent=2) + "\n")
        for name in checkpoint.files:
            if name not in (PROVENANCE, RECIPE) and (content := checkpoint.companion(name)) is not None:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                atomic_write(partial / name, with_changes(content, found.config) if name == "config.json" else content)
        system.rename(partial, output)
    except OSError as error:
        raise system.write_failure(error, output) from error


def _layout(checkpoint: Checkpoint, found: _File) -> Iterator[tuple[str, DType, tuple[int, ...]]]:
    """The tensors of the new folder; an added bias stands behind its weight."""
    for name, tensor in checkpoint.tensors.items():
        yield name, tensor.dtype, tensor.shape
        bias = f"{name.removesuffix('weight')}bias"
        if bias in found.added and bias not in checkpoint.tensors:
            yield bias, tensor.dtype, (found.added[bias],)


def _write(checkpoint: Checkpoint, found: _File, entry: Entry, writer: Writer) -> None:
    """Write a tensor a tile at a time: corrected if it is to be, else its bytes as they are."""
    for start, raw in _tiles(checkpoint, entry):
        if entry.name in found.names:
            values = widen(raw, entry.dtype.name)
            found.of(entry.name, values, entry.shape, start)
            raw = narrow(values, entry.dtype.name)
        writer.write(raw, entry.start + start * entry.dtype.bits // 8)


def _tiles(checkpoint: Checkpoint, entry: Entry) -> Iterator[tuple[int, NDArray[Any]]]:
    """What the model has of a tensor, and where each tile begins; zeros of a bias that it lacks."""
    spans = [(start, min(start + _TILE, entry.size)) for start in range(0, entry.size, _TILE)]
    ref = checkpoint.tensors.get(entry.name)
    if ref is None:
        yield from ((start, np.zeros(stop - start, entry.dtype.storage)) for start, stop in spans)
        return
    with Reader(checkpoint.file(ref.file), checkpoint.headers.get(ref.file)) as reader:
        own = Entry(ref.name, ref.dtype, ref.shape, ref.start, ref.start + ref.nbytes)
        for start, stop in spans:
            yield start, reader.read(own, start, stop)
