"""What a recipe says about data and about the stages around the merge: calibration and all that takes data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HUB = "hub:"
"""What the path of a data set on the Hub begins with."""
FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
"""The formats that are read without an adapter, by the ending of the file's name."""


@dataclass(frozen=True)
class Data:
    """Samples to calibrate with, under the name that the rest of the recipe calls them by."""

    name: str
    path: str
    """A file, relative to the recipe, or ``hub:org/name:split``."""
    samples: int = 128
    max_length: int = 512
    """Tokens of a sample, at most; of a text exactly."""
    column: str | None = None
    """What of each row is the sample; None: ``text``, ``messages``, or ``prompt`` and ``response``."""

    @property
    def format(self) -> Literal["text", "jsonl", "parquet", "hub"] | None:
        """What the samples are written in; None is what only an adapter can read."""
        if self.path.startswith(HUB):
            return "hub"
        return FORMATS.get(Path(self.path).suffix.lower())  # type: ignore[return-value]

    def file(self, folder: Path | None) -> Path | None:
        """The file or folder that holds the samples, whether it exists or not; None on the Hub."""
        return None if self.path.startswith(HUB) else (folder or Path()) / os.path.expanduser(self.path)


@dataclass(frozen=True)
class Calibration:
    """The data of a recipe, in the order of their names."""

    data: tuple[Data, ...]
    adapter: str | None = None
    """A Python file, relative to the recipe, that makes the network and reads the data."""

    def named(self, names: Iterable[str] = ()) -> tuple[Data, ...]:
        """The data of these names, in their order; without names all there are."""
        every = {data.name: data for data in self.data}
        return tuple(every[name] for name in names) or self.data

    def adapter_file(self, folder: Path | None) -> Path | None:
        """The adapter, whether it exists or not; None where the recipe names none."""
        return None if self.adapter is None else (folder or Path()) / os.path.expanduser(self.adapter)


AlignGroup = Literal["mlp", "heads", "vo", "experts", "residual", "units"]
"""The kinds of units that can change places together without changing what the network computes."""


@dataclass(frozen=True)
class Align:
    """How the units of the models are put in the order of one of them, before the merge."""

    method: Literal["weight_matching", "activation_matching"]
    reference: str | None = None
    """The model that keeps its order; see :attr:`mergetool.recipe.Recipe.reference`."""
    groups: tuple[AlignGroup, ...] = ("mlp", "heads", "vo", "experts")
    data: tuple[str, ...] = ()
    """Names of the data whose activations are matched; empty: all."""
    max_sweeps: int = 100
    score: Literal["correlation", "inner_product"] = "correlation"
    """How activations are compared; without meaning where weights are."""
    margin: float = 0.01
    """The least gain over the present order that is acted on, as a share of a perfect match."""
    seed: int = 0
    verify: bool = True


@dataclass(frozen=True)
class Correct:
    """How the statistics of the merged model's activations are put right, after the merge."""

    method: Literal["repair", "tact"]
    scope: Literal["output", "all"] = "output"
    """The last representation, or every layer in turn; where the recipe is silent, REPAIR's is ``all``."""
    statistic: Literal["mean_std", "std"] = "mean_std"
    clamp: float = 10.0
    """No scale is more than this, or less than one over this."""
    data: tuple[str, ...] = ()
    """Names of the data that statistics are taken on; empty: all."""
    samples: int | None = None
    """Of each data at most so many; None: as many as the data says."""
    fold: Literal["per_task", "side_file", "head"] = "per_task"
    """Where the corrections of each task go; without meaning for REPAIR, which has one for all."""


@dataclass(frozen=True)
class Report:
    """What a run's report shows besides what the run finds out anyway."""

    draw: bool = True
    """Whether there is one at all."""
    cka: bool | None = None
    """Whether every two models are compared; None: where the run looks at whole models, and it takes little."""
    data: tuple[str, ...] = ()
    """Names of the data that they are compared on; empty: all."""
    samples: int = 8
    """Of each data at most so many."""


@dataclass(frozen=True)
class Train:
    """How a method that trains its coefficients does so."""

    steps: int = 200
    """Steps of AdamW, at most."""
    learning_rate: float = 0.2
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup: float = 0.05
    """The share of the steps in which the rate rises."""
    clip: float = 1.0
    """The largest norm of a step's gradient; 0 is no limit."""
    batch_tokens: int = 1024
    """Tokens of one step, shared evenly by the models' data."""
    topk: int = 64
    """So many logits of a teacher are kept for each token, and the rest count as one; 0 keeps all."""
    held_out: float = 0.2
    """The share of each model's data that stopping is decided on; 0 is none."""
    every: int = 20
    """Steps between two measurements of what is held out."""
    patience: int = 5
    """Training stops once so many measurements in a row brought nothing better."""
    seed: int = 0


@dataclass(frozen=True)
class Evaluate:
    """How a method that tries merged models out scores them."""

    data: tuple[str, ...] = ()
    """Names of the data that they are scored on; empty: all. Each counts the same."""
    metric: Literal["loss", "accuracy"] = "loss"
    """Nats a prediction, or the share of predictions that are right."""
    dtype: str | None = None
    """The dtype that they are rounded to; None: the one that is stored."""
