"""What was turned, measured and trained ahead of a merge, as its jobs ask for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import Turning
from mergetool.execute.fact_folder import Facts, mapped
from mergetool.facts.correction import Edit
from mergetool.facts.dam import Coefficients
from mergetool.methods import METHODS
from mergetool.plan import Job, Plan
from mergetool.plan.stages import CHOSEN, TRAINED, merged, wanted

if TYPE_CHECKING:
    from mergetool.execute.aligned import Aligned
    from mergetool.execute.known import Extra, Gram

FIELDS = {"gram": "gram", "squared_gradients": "squared_gradient"}
"""What is kept of a tensor in the facts of each kind that is measured."""


@dataclass(frozen=True)
class Prepared:
    """What is known about whole models when jobs are worked on; a :class:`~mergetool.execute.known.Known`.

    Attributes:
        plan: whose jobs may ask.
        turnings: the sources that are read in another order of their units, by their place in the plan.
        measured: the folders of facts, by kind and the source's place in the plan.
        coefficients: what was trained, if anything was.
        trained: the folder that they are kept in.
        shares: how much each source counts in a soup, by its place in the plan, if one was chosen.
        soup: the folder of what was tried for it.
        aligned: what was found for each source that was matched, by its place in the plan.
        transposed: tensors that are stored as [in, out], or [experts, in, out].
        notes: what the user should know.
        edits: what a correction makes of each tensor, by its name.
        corrections: the folders of facts that the edits are from, each with the spread of activations before and after
            in :data:`mergetool.execute.correct_report.SPREAD`.
        beside: files that go into the model folder besides its tensors, by their names there.
    """

    plan: Plan
    turnings: Mapping[int, Turning] = field(default_factory=dict)
    measured: Mapping[tuple[str, int], Facts] = field(default_factory=dict)
    coefficients: Coefficients | None = None
    trained: Path | None = None
    shares: Mapping[int, float] | None = None
    soup: Facts | None = None
    aligned: Mapping[int, Aligned] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    edits: Mapping[str, Edit] = field(default_factory=dict)
    corrections: tuple[Facts, ...] = ()
    beside: Mapping[str, bytes] = field(default_factory=dict)
    _mapped: dict[tuple[Path, str], NDArray[Any]] = field(default_factory=dict, repr=False)

    @property
    def tells(self) -> bool:
        """Whether jobs have anything to ask; the order of sources they need not know of."""
        return bool(self.measured) or self.coefficients is not None or self.shares is not None or bool(self.edits)

    @property
    def left_out(self) -> frozenset[int]:
        """The sources that a soup does without, by their place in the plan; what a rule takes of one, it does not."""
        others = (job for job in self.plan.jobs if job.method and CHOSEN not in wanted(job).values())
        kept = {read.source for job in others for read in job.reads}
        return frozenset(source for source, share in (self.shares or {}).items() if not share) - kept

    @property
    def made_of(self) -> list[Any]:
        """What tells what is known here from what another plan may know, as JSON."""
        facts: list[Any] = [[kind, source, each.path.name] for (kind, source), each in sorted(self.measured.items())]
        if self.shares is not None:
            facts.append(["shares", sorted(self.shares.items())])
        if self.coefficients is None:
            return facts
        made = hashlib.sha256()
        for name, values in sorted(self.coefficients.values.items()):
            made.update(f"{name}\0{values.shape}\0".encode() + np.ascontiguousarray(values).tobytes())
        return [*facts, made.hexdigest()]

    def edit(self, job: Job) -> Edit | None:
        """What a correction makes of a job's result; None where it stays as it is."""
        return None if job.corrected is None else self.edits.get(job.name)

    def extra(self, job: Job, name: str, source: int) -> Extra | None:
        """What the method's argument ``name`` is for a source; None where nothing is known of this tensor.

        Args:
            job: one of the plan's jobs.
            name: an argument of its method, whose kind is ``coefficients``, ``soup`` or ``squared_gradients``.
            source: which of the job's merged sources, the base left out.
        """
        from mergetool.execute.known import Extra

        if wanted(job)[name] == CHOSEN:
            share = None if self.shares is None else self.shares.get(merged(job)[source], 0.0)
            return None if share is None else Extra(np.array(share), ())
        if wanted(job)[name] == TRAINED:
            made = self.coefficients
            if made is None or job.name not in made.values:
                return None
            row = made.sources.index(self.plan.sources[merged(job)[source]].label)
            first, *added = (Extra(values[row], axes) for values, axes in made.of(job.name))
            return replace(first, added=added[0]) if added else first
        values = self._values(job, wanted(job)[name], source)
        return None if values is None or values.shape != job.shape else Extra(values, tuple(range(values.ndim)))

    def matrix(self, job: Job, name: str, source: int) -> Gram | None:
        """The Gram matrix of a source's inputs; None where the tensor multiplies none, as embeddings and norms.

        It is the mean over tokens: how much text a source was given does not count.

        Args:
            job: one of the plan's jobs.
            name: an argument of its method, whose kind is ``gram``.
            source: which of the job's merged sources, the base left out.
        """
        from mergetool.execute.known import Gram

        values = self._values(job, wanted(job)[name], source)
        if values is None or len(job.shape) < 2:
            return None
        stacked = values.ndim == 3
        order = (1, 2) if job.name in self.transposed else (2, 1)
        axes = [axis for axis in (order if stacked else [axis - 1 for axis in order]) if axis < len(job.shape)]
        axis = next((axis for axis in axes if job.shape[axis] == values.shape[-1]), None)
        fits = len(job.shape) == values.ndim and (not stacked or job.shape[0] == values.shape[0])
        if axis is None or not fits:
            return None
        count = np.maximum(self._field(job, "gram", "count", source), 1.0)
        return Gram(np.asarray(values, np.float64) / (count[:, None, None] if stacked else count), axis)

    def _values(self, job: Job, kind: str, source: int) -> NDArray[Any] | None:
        """What is measured of the tensor that a job reads of a source, if anything is."""
        found: NDArray[Any] | None = self._field(job, kind, FIELDS[kind], source)
        return found

    def _field(self, job: Job, kind: str, field: str, source: int) -> Any:
        """A fact of the tensor that a job reads of a source, mapped: what is looked at of it is read."""
        read = job.reads[(METHODS[job.method].base == "required") + source]
        facts = self.measured.get((kind, read.source))
        if facts is None or field not in facts.fields(read.tensor.name):
            return None
        place = facts.place(read.tensor.name, field)
        key = facts.path, place[1].name
        if key not in self._mapped:
            self._mapped[key] = mapped(*place)
        return self._mapped[key]
