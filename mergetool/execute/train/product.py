"""The folder of trained coefficients: safetensors by the names of weights, and beside them how they came to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mergetool.errors import CheckpointError
from mergetool.execute.train.loop import Trained
from mergetool.execute.train.settings import Settings
from mergetool.facts.dam import Coefficients
from mergetool.storage.writer import atomic_write

COEFFICIENTS, ABOUT = "coefficients.safetensors", "dam.json"


def write_coefficients(folder: Path, trained: Trained, settings: Settings) -> None:
    """Write ``coefficients.safetensors``, float32 [sources, ...] for every weight, and ``dam.json`` beside it.

    The latter has form, granularity, the labels of sources and base, the axes of every weight that the coefficients
    follow, the settings, the curves, and for each source the least, mean and largest coefficient.

    Raises:
        RunError: the disk is full or fails.
    """
    made = trained.coefficients
    about = {
        "form": made.form,
        "granularity": made.granularity,
        "sources": list(made.sources),
        "base": made.base,
        "axes": {name: list(axes) for name, axes in made.axes.items()},
        "settings": settings.as_dict(),
        "steps": trained.steps,
        "best_step": trained.best_step,
        "summary": summary(made),
        "curve": trained.curve,
    }
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / COEFFICIENTS, save(dict(made.values), metadata={"format": "np"}))
    # Last, for a folder that has it is complete.
    atomic_write(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def read_coefficients(folder: Path) -> Coefficients:
    """What :func:`write_coefficients` wrote.

    Raises:
        CheckpointError: the folder is not complete, or not of this kind.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        values = load_file(folder / COEFFICIENTS)
        axes = {name: tuple(found) for name, found in about["axes"].items()}
        made = Coefficients(about["form"], about["granularity"], tuple(about["sources"]), about["base"], values, axes)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"holds no trained coefficients: {error}", str(folder), "train them again") from error
    if made.values.keys() != made.axes.keys():
        raise CheckpointError(f"{COEFFICIENTS} and {ABOUT} name different weights", str(folder), "train them again")
    return made


def summary(coefficients: Coefficients) -> dict[str, dict[str, Any]]:
    """For each source the least, the mean and the largest of all its coefficients."""
    result = {}
    for number, source in enumerate(coefficients.sources):
        own = np.concatenate([values[number].ravel() for values in coefficients.values.values()]).astype(np.float64)
        result[source] = {"min": float(own.min()), "mean": float(own.mean()), "max": float(own.max())}
    return result
