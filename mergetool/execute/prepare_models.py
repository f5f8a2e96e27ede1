"""A plan's sources as models that can be run, their units in the order in which they are merged."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mergetool.anatomy import Turning
from mergetool.checkpoint.identity import identity
from mergetool.execute.calibration_adapter import Adapter
from mergetool.execute.devices import torch_names
from mergetool.execute.forward.arrays import turned_weights
from mergetool.execute.forward.model import Model, open_model
from mergetool.execute.forward.places import is_transposed, places
from mergetool.execute.forward.weights import Weights, open_weights
from mergetool.execute.prepared import Prepared
from mergetool.methods import METHODS
from mergetool.plan import Job, Plan


@dataclass(frozen=True)
class Sources:
    """A plan's sources, to be run.

    Attributes:
        plan: the plan.
        turnings: those that are read in another order of their units, by their place in the plan.
        orders: what the order of each of these was found by, for digests.
        adapter: makes the networks that transformers does not know.
        device: where models run; several with commas between, if one may be dealt out to them.
    """

    plan: Plan
    turnings: Mapping[int, Turning] = field(default_factory=dict)
    orders: Mapping[int, str] = field(default_factory=dict)
    adapter: Adapter | None = None
    device: str = "cpu"

    def labels(self, sources: Sequence[int]) -> tuple[str, ...]:
        """What the recipe calls some sources."""
        return tuple(self.plan.sources[source].label for source in sources)

    @contextlib.contextmanager
    def weights(self, source: int) -> Iterator[Weights]:
        """The weights of a source, turned if it is, for a while.

        Raises:
            CheckpointError: a file cannot be fetched or opened.
            SourceChanged: a file is not what it was when the plan was made.
        """
        found = self.plan.sources[source]
        with open_weights(found.checkpoint) as weights:
            turning = self.turnings.get(source)
            yield weights if turning is None else turned_weights(weights, turning, found.label)

    def model(self, source: int, weights: Weights) -> Model:
        """A source as a model that can be run; no weight is read.

        Raises:
            CheckpointError: nobody knows the architecture, or its parameters and the tensors on disk do not match.
        """
        found = self.plan.sources[source]
        return self.opened(found.checkpoint.config, weights, found.label)

    def merged(self, weights: Weights, label: str, changes: Mapping[str, bool] = MappingProxyType({})) -> Model:
        """What is made of the sources as a model that can be run; no weight is read.

        Args:
            weights: its weights.
            label: what to call it in messages.
            changes: what is not as in the lender's config.

        Raises:
            CheckpointError: as :meth:`model`.
        """
        lender = self.plan.sources[self.plan.lender].checkpoint
        return self.opened({**lender.config, **changes}, weights, label)

    def opened(self, config: Mapping[str, Any], weights: Weights, label: str) -> Model:
        """A model of a config, by the adapter's network where there is one; as :meth:`model`."""
        network = None if self.adapter is None else self.adapter.network
        return open_model(config, weights, label, network, torch_names(self.device))

    def made_of(self, source: int) -> dict[str, Any]:
        """What tells a source as it is merged from others: its files, its order, and what makes its network."""
        found = {**identity(self.plan.sources[source].checkpoint), "device": torch_names(self.device).partition(":")[0]}
        if source in self.orders:
            found["order"] = self.orders[source]
        return found if self.adapter is None else {**found, "adapter": self.adapter.digest}

    def made_by(self, jobs: Sequence[Job], known: Prepared, dtypes: bool = True) -> list[Any]:
        """What decides the tensors that jobs make, besides what decides their sources' weights.

        Args:
            jobs: some of the plan's, or like them.
            known: what they are told.
            dtypes: whether it matters what they are rounded to.
        """
        every = sorted({read.source for job in jobs for read in job.reads})
        drawn = [self.plan.recipe.seed, [self.plan.sources[source].label for source in every]]
        told = [
            [job.name, job.dtype.name if dtypes else None, job.method, sorted(job.parameters.items()), job.facts]
            + [[every.index(read.source), read.tensor.name] for read in job.reads]
            for job in jobs
        ]
        return [
            [self.made_of(source) for source in every],
            drawn if any(METHODS[job.method].random for job in jobs if job.method) else [],
            hashlib.sha256(json.dumps(told).encode()).hexdigest(),
            known.made_of,
        ]


def transposed(model: Model) -> frozenset[str]:
    """The tensors on disk that are stored as [in, out], or [experts, in, out]."""
    return frozenset(name for place in places(model) if is_transposed(place.module) for name in place.every)
