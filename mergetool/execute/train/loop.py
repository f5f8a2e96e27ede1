"""The training of coefficients: steps, looks at held-out data, and when to stop."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergetool.errors import NonFinite, PlanError
from mergetool.execute.forward.heap import give_back_large
from mergetool.execute.train.objective import Objective
from mergetool.execute.train.rows import Row, Stream, digest, streams
from mergetool.execute.train.settings import Settings
from mergetool.execute.train.state import STATE, State, begin, resume, write
from mergetool.execute.train.student import Places, Student, same_names
from mergetool.execute.train.teachers import Fresh, Kept, Targets
from mergetool.facts.dam import Coefficients, Slot, initial
from mergetool.facts.dam_merge import Reads, Weights
from mergetool.facts.dam_penalties import interference

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """What training made and how it went.

    Attributes:
        coefficients: the best ones, by the names of weights on disk.
        curve: ``steps`` and ``held_out``, lists of plain records.
        best_step: the step after which the coefficients were taken.
        steps: how many steps were done.
    """

    coefficients: Coefficients
    curve: Mapping[str, list[dict[str, Any]]]
    best_step: int
    steps: int


@dataclass(frozen=True)
class Models:
    """What is merged, and the module that runs it.

    Attributes:
        module: called with the rows; its own weights are not used (see :func:`.student.hollow`).
        sources: the models to merge, by their labels.
        slots: the coefficients of every weight on disk, of :func:`mergetool.facts.dam.slots`.
        base: label and weights of the base; needed for the form ``delta``.
        places: where the module's parameters come from; None for weights of the same names.
        device: where the model runs.
        dtype: what weights are merged and run in; coefficients and their moments are float32 in any case.
    """

    module: torch.nn.Module
    sources: Mapping[str, Weights]
    slots: Sequence[Slot]
    base: tuple[str, Weights] | None = None
    places: Places | None = None
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32


def train(
    models: Models,
    data: Sequence[Sequence[Row]],
    settings: Settings,
    *,
    folder: Path | None = None,
    progress: Callable[[Record], None] | None = None,
) -> Trained:
    """Train coefficients so that the merged model predicts on every source's data what that source predicts.

    Minimises ``sum_i loss(p_i(.|x_i), p_merged(.|x_i))`` plus the penalties (arXiv:2410.08371). In memory are the
    merged model, one tensor of a source and of the base, and what the module needs for a step; while teachers predict,
    one source. The same settings, data and sources give the same coefficients, in one run or in several.

    Args:
        models: the sources, the base and the module.
        data: for each source the rows on which it is the teacher.
        settings: how.
        folder: for what a killed run goes on with, and for teachers' predictions; None keeps them in memory.
        progress: told of every step.

    Raises:
        PlanError: fewer than two sources, no base, data that do not go with the sources or do not suffice.
        CheckpointError: a source lacks a weight or has it in another shape.
        NonFinite: the loss is no finite number.
    """
    _check(models, data, settings)
    give_back_large()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    objective = _objective(
        models, streams(data, settings.held_out, settings.batch_tokens, settings.seed), settings, folder
    )
    state = begin(models.slots, len(models.sources), objective.start, settings, models.device)
    name = _digest(models, data, settings)
    if folder is None or not resume(state, folder, name):
        _look(objective, state)
    while state.step < settings.steps and state.waited < settings.patience:
        record = _step(objective, state)
        if progress is not None:
            progress(record)
        if state.step % settings.every == 0 or state.step == settings.steps:
            _look(objective, state)
        if folder is not None and settings.save_every and state.step % settings.save_every == 0:
            write(state, folder, name)
    if folder is not None:
        write(state, folder, name)
    return _trained(models, objective, state)


def forget(folder: Path) -> None:
    """Delete what a killed run would go on with, once the coefficients are written."""
    for path in [folder / STATE, *folder.glob("teacher-*.safetensors")]:
        path.unlink(missing_ok=True)


def _check(models: Models, data: Sequence[object], settings: Settings) -> None:
    if len(models.sources) < 2:
        raise PlanError(f"coefficients are trained for two models or more, not {len(models.sources)}")
    if len(data) != len(models.sources):
        raise PlanError(f"{len(models.sources)} sources and calibration data for {len(data)}: each needs its own")
    if settings.form == "delta" and models.base is None:
        raise PlanError("the form delta weighs what the sources changed of a base, and none is given")
    if not any(slot.trained for slot in models.slots):
        raise PlanError("none of the weights is trained", fix="name other parts as trainable")


def _objective(models: Models, data: Sequence[Stream], settings: Settings, folder: Path | None) -> Objective:
    sources = tuple(models.sources.values())
    base = models.base[1] if models.base is not None and settings.form == "delta" else None
    reads = {slot.name: Reads(slot, sources, base, models.device, models.dtype) for slot in models.slots}
    module = models.module.eval()  # dropout would make noise
    student = Student(module, models.places or same_names(module, list(reads)), reads)
    targets = [
        _targets(student, label, weights, stream, settings, folder)
        for (label, weights), stream in zip(models.sources.items(), data, strict=True)
    ]
    start = initial(settings.form, len(sources)) if settings.initial is None else settings.initial
    trained = [each for slot in models.slots for each in slot.sets if each.trained]
    weighted = None
    if settings.weighted_overlap:
        weighted = [interference(replace(reads[each.name], slot=each)) for each in trained]
    return Objective(student, {slot.name: slot for slot in models.slots}, data, targets, settings, start, weighted)


def _targets(
    student: Student, label: str, weights: Weights, stream: Stream, settings: Settings, folder: Path | None
) -> Targets:
    def load() -> Callable[[Row], torch.Tensor]:
        return partial(student.logits, student.source(weights))

    k, temperature = settings.topk, settings.temperature
    if not k:
        return Fresh(stream.rows, load, temperature)
    what = f"{label} {digest(stream.rows)} {k} {temperature!r}"
    kept = Kept(folder, f"teacher-{stream.number}-{hashlib.sha256(what.encode()).hexdigest()[:8]}")
    kept.complete(stream.rows, load, k, temperature)
    return kept


def _step(objective: Objective, state: State) -> Record:
    """One step of the optimizer."""
    settings = objective.settings
    rate = settings.rate(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad()
    losses, extra = objective.gradients(state.values, state.step)
    norm = float(torch.nn.utils.clip_grad_norm_(state.values.values(), settings.clip or math.inf))
    total = sum(losses) + extra
    if not math.isfinite(total + norm):
        what = f"the loss of step {state.step + 1} is {total}, the norm of its gradient {norm}"
        raise NonFinite(what, fix="lower the learning rate, and see whether the sources predict finite numbers")
    state.optimizer.step()
    state.step += 1
    shown = {"step": state.step, "loss": total, "each": losses, "penalty": extra, "rate": rate, "gradient": norm}
    state.curve["steps"].append(shown)
    return shown


def _look(objective: Objective, state: State) -> None:
    """Keep the coefficients if no others came so near to the teachers on held-out data."""
    if not objective.settings.held_out:
        return
    each = objective.held_out(state.values)
    total = sum(each)
    state.curve["held_out"].append({"step": state.step, "kl": total, "each": each})
    if total < state.best_kl:
        state.best_kl, state.best_step, state.waited = total, state.step, 0
        state.best = {key: value.detach().clone() for key, value in state.values.items()}
    else:
        state.waited += 1


def _digest(models: Models, data: Sequence[Sequence[Row]], settings: Settings) -> str:
    """What a training is known by: two that have it in common make the same coefficients."""
    told = {name: value for name, value in settings.as_dict().items() if name != "save_every"}
    drawn = [(s.label, s.shape, s.axes, s.key, s.trained) for slot in models.slots for s in slot.sets]
    labels = [*models.sources, models.base[0] if models.base else None]
    what = [labels, [digest(each) for each in data], told, drawn, str(models.dtype)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _trained(models: Models, objective: Objective, state: State) -> Trained:
    final = state.best or state.values
    with torch.no_grad():
        values = {
            each.label: values.cpu().numpy().copy()
            for name, slot in objective.slots.items()
            for each, values in zip(slot.sets, objective.coefficients(final, name), strict=True)
        }
    settings = objective.settings
    base = models.base[0] if models.base is not None and settings.form == "delta" else None
    axes = {each.label: each.axes for slot in objective.slots.values() for each in slot.sets}
    made = Coefficients(settings.form, settings.granularity, tuple(models.sources), base, values, axes)
    return Trained(made, state.curve, state.best_step if state.best else state.step, state.step)
