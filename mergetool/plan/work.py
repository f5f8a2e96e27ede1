"""The plan as plain data: sources, stages, jobs, shards, and where every source tensor goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mergetool.anatomy import Anatomy, Part
from mergetool.checkpoint.checkpoint import Checkpoint, TensorRef
from mergetool.facts.outputs import Outputs
from mergetool.recipe import Recipe
from mergetool.recipe.data import Data
from mergetool.storage.dtypes import DType
from mergetool.storage.shards import Shard

WIDE = 16
"""A tensor of more tiles than this is worked on by all workers together."""
Fate = Literal["merged", "copied", "compared", "tied", "dropped", "replaced", "lends its files"]
"""What becomes of a source's tensor."""


@dataclass(frozen=True)
class Source:
    """One model of the recipe, opened: headers and config, no weights."""

    label: str
    """As the recipe writes it; also the name of its random numbers."""
    checkpoint: Checkpoint
    anatomy: Anatomy


@dataclass(frozen=True)
class Read:
    """One tensor of one source."""

    source: int
    """Its place in :attr:`Plan.sources`."""
    tensor: TensorRef


@dataclass(frozen=True)
class Job:
    """One output tensor and all it takes to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    """The dtype it is stored in."""
    part: Part
    method: str
    """A method of the catalogue; ``""`` for a tensor whose bytes are copied because it holds no floating numbers."""
    reads: tuple[Read, ...]
    """What the method takes, the base first where it takes one; for a copy the one tensor that is copied."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Every parameter by recipe name; per-source ones are tuples in the order of the reads, the base left out."""
    compare: tuple[Read, ...] = ()
    """For a copy: the same tensor of other sources, which is expected to be equal."""
    facts: tuple[str, ...] = ()
    """Measures of the method that a stage ahead makes for the whole model."""
    passes: int = 1
    """How often the merge goes over its sources if they cannot be held: to measure, then once to combine."""
    reason: str = ""
    """Why it is not the recipe's own method: a rule, or what the tensor is."""
    corrected: int | None = None
    """The axis along which a correction scales and shifts the result; None: it is not corrected."""

    @property
    def added(self) -> bool:
        """Whether no source has it: a bias of zeros, which a correction shifts."""
        return not self.reads

    @property
    def size(self) -> int:
        """The number of elements."""
        count = 1
        for axis in self.shape:
            count *= axis
        return count

    @property
    def bytes_read(self) -> int:
        """Bytes of all its sources."""
        return sum(read.tensor.nbytes for read in (*self.reads, *self.compare))

    @property
    def bytes_written(self) -> int:
        """Bytes of the result."""
        return self.dtype.nbytes(self.shape)


@dataclass(frozen=True)
class Task:
    """One correction of the merged model."""

    name: str
    """Of its data; empty for the one correction of REPAIR, which is for all."""
    data: tuple[Data, ...]
    """What the models are run on."""
    source: int | None = None
    """The source whose statistics are aimed at, as a place in the plan's; None: what all have on average."""


@dataclass(frozen=True)
class Correction:
    """What is put right in the merged model."""

    outputs: Outputs
    """What is corrected, and what its config holds of it."""
    tasks: tuple[Task, ...]
    jobs: tuple[Job, ...]
    """All tensors of the corrected model, whether they are written or not."""


@dataclass(frozen=True)
class Stage:
    """One pass over the models; what it makes is a folder of named tensors."""

    name: Literal["align", "measure", "train", "evaluate", "compare", "correct", "merge"]
    jobs: tuple[int, ...]
    """Places in :attr:`Plan.jobs`."""
    passes: int
    """How often the stage reads its tensors; of large ones about, and others less often. Of training, its steps; of an
    evaluation, how many models are tried; of a correction, how often a layer is run."""
    tokens: int = 0
    """The most tokens that models are run on; 0 where none is run."""
    bytes_read: int = 0
    """Bytes read of the models, if whole models are read; the jobs of other stages say it."""
    memory: int = 0
    """About the most bytes that weights and what is made of them take at once, which no budget bounds; else 0."""

    @property
    def jobs_alone(self) -> bool:
        """Whether it is a measurement of jobs' tensors, as the merge is, and runs no model."""
        return self.name == "measure" and not self.memory


@dataclass(frozen=True)
class Route:
    """Where one tensor of one source goes, and by which rule."""

    source: int
    tensor: str
    fate: Fate
    by: str


@dataclass(frozen=True)
class Memory:
    """How a run keeps to its budget; bytes."""

    budget: int
    peak: int
    """The most anonymous memory the run takes at once, the interpreter included."""
    workers: int
    tile: int
    """Coordinates computed at once by one worker."""
    resident: int
    """What a worker keeps of a tensor's sources while it is measured and combined; the rest is read for each pass."""

    def wide(self, job: Job) -> bool:
        """Whether all workers share the job's tiles."""
        return job.size > WIDE * self.tile and self.workers > 1

    def holds(self, job: Job) -> bool:
        """Whether all of the job's sources are kept while it is worked on, so that they are read once."""
        return job.bytes_read <= self.resident and not self.wide(job)


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, known before a single weight is read."""

    recipe: Recipe
    sources: tuple[Source, ...]
    lender: int
    """The source whose layout, config and other files the output takes: the base, else the first."""
    tokenizer: int
    """The source whose tokenizer files the output takes."""
    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    stages: tuple[Stage, ...]
    routes: tuple[Route, ...]
    memory: Memory
    digest: str
    """A hash of the recipe, the sources' configs, headers and files, and the layout: equal digests, equal bytes."""
    output: Path | None
    notes: tuple[str, ...] = ()
    """What a user should know and nothing is wrong with."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What tells the content of the recipe's data from others', by name."""
    correction: Correction | None = None
    """What is put right in the result, if anything."""
    left_out: frozenset[int] = frozenset()
    """Sources that were tried ahead of the merge and not taken, by their place; known once they were tried."""
    task: str = ""
    """The task whose model this is, where each task has a model of its own; see :func:`mergetool.plan.tasks`."""

    @property
    def config(self) -> Mapping[str, bool]:
        """What changes in the lender's ``config.json``, so that the output is read with all its tensors."""
        holds = self.correction is not None and self.jobs == self.correction.jobs
        return self.correction.outputs.config if self.correction is not None and holds else {}

    def passes(self, job: Job) -> int:
        """How often a run reads a job's sources, all stages together; when more than once, about."""
        ahead = sum(stage.passes for stage in self.stages if stage.jobs_alone) if job.facts else 0
        return ahead + (1 if self.memory.holds(job) else job.passes)

    @property
    def bytes_read(self) -> int:
        """Bytes the run reads from the sources, every pass counted; see :attr:`read_once`."""
        return sum(job.bytes_read * self.passes(job) for job in self.jobs)

    @property
    def read_once(self) -> bool:
        """Whether no tensor is read again, so that :attr:`bytes_read` is exact and not about the most."""
        return all(self.passes(job) == 1 for job in self.jobs)

    @property
    def bytes_written(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def job(self, name: str) -> Job:
        """The job that makes a tensor; KeyError when there is none."""
        for job in self.jobs:
            if job.name == name:
                return job
        raise KeyError(name)
