"""What models are matched and checked on: the recipe's data, or random inputs where it has none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mergetool.execute.calibration import Samples, read
from mergetool.execute.calibration_adapter import Adapter
from mergetool.execute.prepare_data import adapter_of, longest, tokenizer_of
from mergetool.plan import Plan
from mergetool.plan.work import Source
from mergetool.recipe.data import Align, Data

if TYPE_CHECKING:
    from mergetool.execute.forward.skeleton import Network


@dataclass(frozen=True)
class Inputs:
    """Data for a recipe's ``align``, read when they are first asked for.

    Attributes:
        plan: the plan.
        align: its ``align``.
        reference: the model whose tokenizer reads texts.
        trust_code: whether the recipe's adapter may be run.
        device: where models are run and their weights compared.
    """

    plan: Plan
    align: Align
    reference: Source
    trust_code: bool
    device: str = "cpu"

    @cached_property
    def adapter(self) -> Adapter | None:
        """The recipe's adapter, if it names one.

        Raises:
            PlanError: it may not be run, or fails.
        """
        return adapter_of(self.plan, self.trust_code)

    @property
    def network(self) -> Network | None:
        """What makes the network of models that transformers does not know."""
        return None if self.adapter is None else self.adapter.network

    @property
    def data(self) -> tuple[Data, ...]:
        """The data that ``align`` is about; none where the recipe has none."""
        calibration = self.plan.recipe.calibration
        return () if calibration is None else calibration.named(self.align.data)

    @cached_property
    def samples(self) -> tuple[Samples, ...]:
        """All the data.

        Raises:
            PlanError: data cannot be read, or hold too little.
            CheckpointError: the reference has no tokenizer.
        """
        return tuple(self._read(data) for data in self.data)

    @cached_property
    def few(self) -> tuple[Samples, ...]:
        """A little of the first data; as it is where an adapter reads it."""
        return tuple(self._read(replace(data, samples=min(data.samples, 2))) for data in self.data[:1])

    def _read(self, data: Data) -> Samples:
        reader = self.adapter or tokenizer_of(self.reference)
        most = longest(self.reference.checkpoint.config)
        return read(data, reader, self.plan.recipe.folder, self.align.seed, longest=most)
