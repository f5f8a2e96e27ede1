"""The facts of a correction read back: what becomes of each tensor, from a finished folder or one in the making."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.execute.fact_folder import Facts, mapped
from mergetool.execute.fact_making import Making
from mergetool.facts.correction import Edit
from mergetool.plan import Job

ABOUT = "correction"
"""The key in the metadata of a task's file that says what is in it, as JSON."""


def arrays_of(folder: Facts | Making) -> dict[str, NDArray[Any]]:
    """All facts by their full names; each is a vector.

    Raises:
        CheckpointError: a file is damaged.
    """
    entries = (folder if isinstance(folder, Facts) else folder.done).entries
    return {name: np.array(mapped(file, entry)) for name, (file, entry) in entries.items()}


def edits_of(folder: Facts | Making, jobs: Mapping[str, Job]) -> dict[str, Edit]:
    """What becomes of each tensor, as far as it is known.

    Args:
        folder: the facts.
        jobs: those of the corrected model, which know the axes.
    """
    arrays = arrays_of(folder)
    found = {}
    for name, job in jobs.items():
        scale, shift = arrays.get(f"{name}:scale"), arrays.get(f"{name}:shift")
        if job.corrected is not None and (scale is not None or shift is not None):
            found[name] = Edit(job.corrected, scale, shift)
    return found
