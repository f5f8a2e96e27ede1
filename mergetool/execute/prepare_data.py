"""The calibration data of a plan's sources: each its own, in its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergetool.checkpoint.layout import is_tokenizer
from mergetool.errors import PlanError
from mergetool.execute.calibration import Samples, open_tokenizer, read
from mergetool.execute.calibration_adapter import Adapter, load_adapter
from mergetool.plan import Plan
from mergetool.plan.sources import place
from mergetool.plan.work import Source
from mergetool.recipe.data import Data


@dataclass(frozen=True)
class SourceData:
    """What the sources are run on, read when it is asked for, and once.

    Attributes:
        plan: the plan.
        adapter: reads the data of models that transformers does not know.
    """

    plan: Plan
    adapter: Adapter | None = None
    _read: dict[tuple[Data, int, bool], Samples] = field(default_factory=dict, repr=False)
    _tokenizers: dict[int, Any] = field(default_factory=dict, repr=False)

    def of(self, source: int, labels: bool = False) -> tuple[Samples, ...]:
        """The samples of a source: of its own data, or of all where it has none of its own.

        Args:
            source: its place in the plan.
            labels: whether to say which tokens are to be predicted; what an adapter reads comes without.

        Raises:
            PlanError: it has no data, or they cannot be read, hold too little, or lack what is to be predicted.
            CheckpointError: there is no tokenizer, or it cannot be loaded.
        """
        recipe, found = self.plan.recipe, self.plan.sources[source]
        every = recipe.data_of(found.label)
        if not every:
            fix = "add `calibration: {data: {NAME: FILE}}`"
            raise PlanError(f"there are no calibration data of {found.label}", place(recipe, found.label), fix)
        return self.named(every, source, labels and self.adapter is None)

    def named(self, every: Sequence[Data], source: int, labels: bool = False) -> tuple[Samples, ...]:
        """The samples of some data, in the tokens of a source.

        Args:
            every: the data.
            source: its place in the plan.
            labels: whether to say what is to be predicted; an adapter's own labels are kept then.

        Raises:
            PlanError: they cannot be read, hold too little, or lack what is to be predicted.
            CheckpointError: there is no tokenizer, or it cannot be loaded.
        """
        recipe, found = self.plan.recipe, self.plan.sources[source]
        reader = self._reader(source)
        most = None if self.adapter is not None else longest(found.checkpoint.config)
        for data in every:
            key = data, self._speaker(source), labels
            if key not in self._read:
                self._read[key] = read(data, reader, recipe.folder, recipe.seed, labels=labels, longest=most)
        return tuple(self._read[data, self._speaker(source), labels] for data in every)

    def shared(self, sources: Sequence[int], names: Sequence[str], most: int) -> tuple[Samples, ...]:
        """Samples that several sources are run on together, in the tokens of the output.

        Args:
            sources: their places in the plan.
            names: the data; all where none is named.
            most: of each data so many samples at most.

        Raises:
            PlanError: the data cannot be read, or hold too little.
            CheckpointError: the output has no tokenizer, or it cannot be loaded.
        """
        recipe = self.plan.recipe
        every = () if recipe.calibration is None else recipe.calibration.named(names)
        limits = [longest(self.plan.sources[source].checkpoint.config) for source in sources]
        shortest = min((limit for limit in limits if limit is not None), default=None)
        reader = self._reader(self.plan.tokenizer)
        some = [replace(data, samples=min(data.samples, most)) for data in every]
        return tuple(read(data, reader, recipe.folder, recipe.seed, longest=shortest) for data in some)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know about all that was read."""
        return tuple(dict.fromkeys(note for samples in self._read.values() for note in samples.notes))

    def _speaker(self, source: int) -> int:
        """The source whose tokenizer reads a source's data: its own if it has one, else the output's."""
        files = self.plan.sources[source].checkpoint.files
        return source if any(map(is_tokenizer, files)) else self.plan.tokenizer

    def _reader(self, source: int) -> Any:
        if self.adapter is not None:
            return self.adapter
        speaker = self._speaker(source)
        if speaker not in self._tokenizers:
            self._tokenizers[speaker] = tokenizer_of(self.plan.sources[speaker])
        return self._tokenizers[speaker]


def adapter_of(plan: Plan, trust_code: bool) -> Adapter | None:
    """The recipe's adapter, if it names one.

    Raises:
        PlanError: it may not be run, or fails.
    """
    calibration = plan.recipe.calibration
    file = None if calibration is None else calibration.adapter_file(plan.recipe.folder)
    return None if file is None else load_adapter(file, trust_code)


def tokenizer_of(source: Source) -> Any:
    """A source's own tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    checkpoint = source.checkpoint
    where = checkpoint.repo or checkpoint.path
    assert where is not None  # a checkpoint is in a folder or on the Hub
    return open_tokenizer(where, source.label, checkpoint.commit)


def longest(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model of this config takes, where it says so."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(each.get(key), int):
                return int(each[key])
    return None
