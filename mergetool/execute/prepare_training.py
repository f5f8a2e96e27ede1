"""The coefficients of a plan's jobs, trained on the sources' data into a folder of facts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from mergetool.anatomy import Part
from mergetool.errors import MissingTensor, PlanError
from mergetool.execute.calibration import Samples
from mergetool.execute.devices import torch_names
from mergetool.execute.fact_folder import Facts
from mergetool.execute.fact_making import Making, facts_folder
from mergetool.execute.forward.weights import Weights, refuse_nonfinite
from mergetool.execute.prepare_data import SourceData
from mergetool.execute.prepare_models import Sources, transposed
from mergetool.execute.progress import Progress
from mergetool.execute.train.loop import Models, Trained, train
from mergetool.execute.train.product import ABOUT, COEFFICIENTS, read_coefficients, write_coefficients
from mergetool.execute.train.rows import Row, responses, rows
from mergetool.execute.train.settings import Settings
from mergetool.execute.train.student import places_of
from mergetool.facts.dam import KINDS, Coefficients, Slot, slots
from mergetool.plan import Job
from mergetool.plan.faults import listed
from mergetool.plan.stages import TRAINED, merged
from mergetool.recipe.data import Train

KIND = TRAINED
"""What folders of trained coefficients are called."""
FIELDS = ("coefficients", "row_coefficients")
"""What facts call the coefficients of a weight, and those of its rows that are added to them."""


def train_all(
    sources: Sources, data: SourceData, jobs: Sequence[Job], progress: Progress, root: Path | None
) -> tuple[Coefficients, Path, tuple[str, ...]]:
    """Train the coefficients of all jobs together, or find those that were trained before.

    Args:
        sources: the plan's sources.
        data: their data.
        jobs: those whose methods take coefficients.
        progress: is told how many bytes of weights are read.
        root: where folders of facts are kept; the cache by default.

    Returns:
        The coefficients, the folder that they are kept in, and what the user should know.

    Raises:
        PlanError: the jobs differ in how they are to be trained, or the data do not suffice.
        CheckpointError: a model cannot be read or run.
        NonFinite: the loss is no finite number.
        RunError: the disk is full or fails.
    """
    settings = settings_of(sources, jobs)
    own = merged(jobs[0])
    base = _base(sources, settings)
    samples = [data.of(source, labels=True) for source in own]
    trained = [job.name for job in jobs]
    made_of = {
        "models": [sources.made_of(source) for source in own],
        "base": None if base is None else sources.made_of(base),
        "data": [[each.digest for each in every] for every in samples],
        "settings": settings.as_dict(),
        "names": sorted(trained),
    }
    labels = sources.labels(own)
    notes = _notes(sources, trained)
    with facts_folder(KIND, made_of, root, ", ".join(labels)) as found:
        if isinstance(found, Making):
            found = _made(
                sources, own, base, [list(map(_rows, every)) for every in samples], jobs, settings, found, progress
            )
        made, folder = read_coefficients(found.path), found.path
    # A folder is called by what the models are; here they have the names of this recipe.
    return replace(made, sources=labels), folder, notes


def settings_of(sources: Sources, jobs: Sequence[Job]) -> Settings:
    """How coefficients are trained: as the recipe's ``train`` says, and the method's parameters of these names.

    ``whole`` says which form they have.

    Raises:
        PlanError: the parameters differ from tensor to tensor, or are out of range.
    """
    recipe = sources.plan.recipe
    known = {"whole", *(each.name for each in fields(Settings))}
    asked = [{name: value for name, value in job.parameters.items() if name in known} for job in jobs]
    for job, own in zip(jobs, asked, strict=True):
        if own != asked[0] or merged(job) != merged(jobs[0]):
            name = next((name for name in own if own[name] != asked[0].get(name)), "merge_method")
            what = f"`{name}` differs between `{jobs[0].name}` and `{job.name}`"
            what += ", and their coefficients are trained together"
            raise PlanError(what, recipe.where("parameters", name), "give it one value")
    chosen = dict(asked[0])
    if "whole" in chosen:
        chosen["form"] = "full" if chosen.pop("whole") else "delta"
    if isinstance(chosen.get("trainable"), str):
        chosen["trainable"] = _kinds(chosen["trainable"])
    return Settings(**{**asdict(recipe.train or Train()), **chosen})


def _kinds(text: str) -> Any:
    """The parts that a text names: ``all``, or some with commas, spaces or plus signs between."""
    return KINDS if text == "all" else tuple(text.replace(",", " ").replace("+", " ").split())


def _base(sources: Sources, settings: Settings) -> int | None:
    if settings.form != "delta":
        return None
    labels = [source.label for source in sources.plan.sources]
    base = sources.plan.recipe.base_model
    if base not in labels:
        what = "the form delta weighs what the sources changed of a base, and the recipe has none"
        raise PlanError(what, sources.plan.recipe.where("merge_method"), "name a `base_model`, or set `form: full`")
    return labels.index(base)


def _notes(sources: Sources, trained: Sequence[str]) -> tuple[str, ...]:
    others = [job.name for job in sources.plan.jobs if job.method and job.name not in set(trained)]
    if not others:
        return ()
    return (f"coefficients were trained as if the models' mean were taken of {listed(others)}, which a rule makes",)


def _rows(samples: Samples) -> list[Row]:
    """The rows of a data set; in texts only what is to be predicted counts."""
    return rows(samples.parts) if samples.padding is None else responses(samples.parts)


class _Renamed:
    """The weights of a source by the names of the output: a tied one may be stored under its other name."""

    def __init__(self, weights: Weights, names: Mapping[str, str], label: str) -> None:
        self.weights, self.names, self.label = weights, names, label
        self._finite: set[str] = set()

    def get(self, name: str) -> torch.Tensor:
        """A tensor in its shape.

        Raises:
            MissingTensor: the source has none of this name.
            NonFinite: it holds a NaN or an infinity.
        """
        own = self.names.get(name, name)
        if own not in self.weights.shapes:
            raise MissingTensor("there is no tensor of this name", f"{self.label}: {name}")
        tensor = self.weights.get(own)
        if own not in self._finite:  # every step reads it; once is enough
            refuse_nonfinite(f"{self.label}: {own}", tensor)
            self._finite.add(own)
        return tensor


def _made(
    sources: Sources,
    own: Sequence[int],
    base: int | None,
    data: Sequence[Sequence[Sequence[Row]]],
    jobs: Sequence[Job],
    settings: Settings,
    found: Making,
    progress: Progress,
) -> Facts:
    """Train, and write the folder; what a killed run left there is gone on with."""
    plan = sources.plan
    names: dict[int, dict[str, str]] = {i: {} for i in range(len(plan.sources))}
    for job in plan.jobs:
        for read in job.reads:
            names[read.source][job.name] = read.tensor.name
    with contextlib.ExitStack() as held:
        opened = {
            i: held.enter_context(sources.weights(i)) for i in {*own, plan.lender, *([] if base is None else [base])}
        }
        views = {i: _Renamed(weights, names[i], plan.sources[i].label) for i, weights in opened.items()}
        model = sources.model(plan.lender, opened[plan.lender])
        places = places_of(model)
        needed = {name: tuple(model.weights.shapes[name]) for place in places.places for name in place.names}
        models = Models(
            module=model.module,
            sources={plan.sources[i].label: views[i] for i in own},
            slots=_slots(model.anatomy.parts, needed, jobs, settings, transposed(model)),
            base=None if base is None else (plan.sources[base].label, views[base]),
            places=places,
            device=torch_names(sources.device).partition(",")[0],
        )
        every = [[row for rows in each for row in rows] for each in data]
        trained = _trained(models, every, settings, found, progress)
    return _written(trained, settings, found)


def _slots(
    parts: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
    jobs: Sequence[Job],
    settings: Settings,
    turned: frozenset[str],
) -> tuple[Slot, ...]:
    """The coefficients of all weights; those of other methods' tensors stay as they begin."""
    mine = {job.name for job in jobs}
    how = {"granularity": settings.granularity, "trainable": settings.trainable, "transposed": turned}
    drawn = slots(parts, shapes, **how)  # type: ignore[arg-type]
    return tuple(slot if slot.name in mine else slot.untrained() for slot in drawn)


def _trained(
    models: Models, data: Sequence[Sequence[Row]], settings: Settings, found: Making, progress: Progress
) -> Trained:
    """Train with progress told in bytes: every step reads all weights twice."""
    once = sum(4 * torch.Size(slot.shape).numel() for slot in models.slots)
    step = 2 * once * (len(models.sources) + (models.base is not None))
    progress.start(settings.steps * step, "train")
    try:
        return train(models, data, settings, folder=found.path, progress=lambda record: progress.advance(step))
    finally:
        progress.close()


def _written(trained: Trained, settings: Settings, found: Making) -> Facts:
    """The coefficients as facts of their weights, and with all about them as :mod:`.train.product` keeps them."""
    # What a killed run goes on with stays until the folder is whole: `finish` leaves it behind.
    made = trained.coefficients
    kept = {
        f"{name}:{field}": values
        for name in made.weights
        for field, (values, _) in zip(FIELDS, made.of(name), strict=False)  # most have one
    }
    found.add("train", kept, {}, made.weights)
    write_coefficients(found.path, trained, settings)
    return found.finish(beside=(COEFFICIENTS, ABOUT))
