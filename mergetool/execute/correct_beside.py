"""Corrections of tasks as files beside a model: factors to apply to it, or each task's own head with them folded in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.execute.correct import Found
from mergetool.execute.correct_facts import ABOUT, arrays_of
from mergetool.execute.correct_steps import INPUT_SHIFT
from mergetool.execute.prepare_models import Sources
from mergetool.facts.correction import Factors, fold_into_reader
from mergetool.facts.outputs import Output
from mergetool.kernels.rounding import narrow
from mergetool.plan.correction import CORRECTIONS, HEADS
from mergetool.storage.dtypes import DTYPES, DType
from mergetool.storage.header import lay_out

Named = Mapping[str, tuple[DType, NDArray[Any]]]


def beside(sources: Sources, found: Sequence[Found]) -> dict[str, bytes]:
    """The files of all tasks by their names in the model folder."""
    recipe = sources.plan.recipe.correct
    assert recipe is not None  # it asked for these files
    if recipe.fold == "head":
        return {f"{HEADS}/{each.task.name}.safetensors": _head(sources, each) for each in found}
    return {f"{CORRECTIONS}/{each.task.name}.safetensors": _factors(sources, each) for each in found}


def _factors(sources: Sources, found: Found) -> bytes:
    """The edits of every tensor, float64, with their axes."""
    correction = sources.plan.correction
    assert correction is not None  # it was found
    axes = {job.name: job.corrected for job in correction.jobs if job.name in found.edits}
    tensors: dict[str, tuple[DType, NDArray[Any]]] = {}
    for name in axes:
        edit = found.edits[name]
        for field, values in (("scale", edit.scale), ("shift", edit.shift)):
            if values is not None:
                tensors[f"{name}:{field}"] = DTYPES["F64"], values
    about = {
        "task": found.task.name,
        "axes": axes,
        "added": dict(correction.outputs.added),
        "config": dict(correction.outputs.config),
    }
    return _file(tensors, about)


def _head(sources: Sources, found: Found) -> bytes:
    """The task's own head, which reads the merged model's last state as if it were its own model's."""
    correction, source = sources.plan.correction, found.task.source
    assert correction is not None  # it was found
    assert source is not None  # a task has a model
    jobs = {job.name: job for job in correction.jobs}
    arrays = arrays_of(found.facts)
    tensors: dict[str, tuple[DType, NDArray[Any]]] = {}
    with sources.weights(source) as weights:
        for output in correction.outputs.outputs:
            if f"{output.weight}:scale" not in arrays:  # no pass went through it
                continue
            values = [weights.get(name).numpy() for name in output.own]
            for name, folded in zip(output.own, _folded(output, values, arrays), strict=True):
                dtype = jobs[name].dtype
                tensors[name] = dtype, narrow(folded, dtype.name).reshape(folded.shape)
    return _file(tensors, {"task": found.task.name, "replaces": list(tensors)})


def _folded(
    output: Output, values: Sequence[NDArray[Any]], arrays: Mapping[str, NDArray[Any]]
) -> Sequence[NDArray[np.float64]]:
    scale, shift = arrays[f"{output.weight}:scale"], arrays[f"{output.weight}:{INPUT_SHIFT}"]
    bias = values[1] if len(values) > 1 else None
    return fold_into_reader(values[0], bias, Factors(scale, shift), output.axis)[: len(values)]


def _file(tensors: Named, about: Mapping[str, Any]) -> bytes:
    """A safetensors file; the same content gives the same bytes."""
    layout = [(name, dtype, values.shape) for name, (dtype, values) in tensors.items()]
    _, preamble = lay_out(layout, {"format": "pt", ABOUT: json.dumps(about, sort_keys=True)})
    return preamble + b"".join(np.ascontiguousarray(values).tobytes() for _, values in tensors.values())
