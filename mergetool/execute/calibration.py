"""Calibration data as batches for a forward pass: texts, rows of tables, and whatever an adapter reads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import CheckpointError, PlanError
from mergetool.execute.calibration_adapter import Adapter
from mergetool.execute.calibration_rows import chosen_rows
from mergetool.execute.calibration_text import IGNORED, Encoder, Row, windows
from mergetool.publish.loadable import first_line, quiet
from mergetool.recipe.data import Data
from mergetool.recipe.files import fault

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, "torch.Tensor"]
"""Keyword inputs of a forward pass, the samples along the first axis of each; and perhaps ``labels``."""


@dataclass(frozen=True)
class Samples:
    """Samples of one data set, always the same for the same content, settings and seed."""

    name: str
    parts: tuple[Batch, ...]
    """Texts one by one, ``[1, tokens]`` each; of an adapter the batches that it gave."""
    padding: int | None = None
    """The token that texts are filled up with; None where an adapter made the batches, which stay as they are."""
    notes: tuple[str, ...] = ()
    """What the user should know, such as that there are fewer samples than asked for."""

    def __len__(self) -> int:
        """How many samples there are."""
        return sum(len(next(iter(part.values()))) for part in self.parts)

    @property
    def digest(self) -> str:
        """The SHA-256 of all the tensors with their names and shapes, in hexadecimal."""
        import torch

        made = hashlib.sha256()
        for part in self.parts:
            for name, tensor in sorted(part.items()):
                made.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                made.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return made.hexdigest()

    def batches(self, rows: int = 8) -> Iterator[dict[str, torch.Tensor]]:
        """The samples in their order.

        Texts come as ``input_ids`` and ``attention_mask``, int64 ``[rows, tokens]``, padded on the right as far as
        the longest of the batch needs; with labels also ``labels``, -100 where nothing is to be predicted. Batches of
        an adapter come as it made them.

        Args:
            rows: texts in one batch, at most.
        """
        if self.padding is None:
            yield from (dict(part) for part in self.parts)
            return
        for start in range(0, len(self.parts), rows):
            yield self._joined(self.parts[start : start + rows])

    def _joined(self, parts: Sequence[Batch]) -> dict[str, torch.Tensor]:
        from torch.nn.utils.rnn import pad_sequence

        fill = {"input_ids": self.padding, "attention_mask": 0, "labels": IGNORED}
        return {
            name: pad_sequence([part[name][0] for part in parts], batch_first=True, padding_value=fill[name])
            for name in parts[0]
        }


def read(
    data: Data,
    reader: Any,
    folder: Path | None = None,
    seed: int = 0,
    *,
    labels: bool = False,
    longest: int | None = None,
) -> Samples:
    """Read calibration data and choose samples that are spread over them.

    A text is tokenised as a whole and cut into windows of ``max_length`` tokens side by side; a rest is left out. Of
    a table each row is a sample, cut off after ``max_length`` tokens: its ``text``, its ``messages`` as the
    tokenizer's chat template writes them, or its ``prompt`` with its ``response`` right behind. Windows or rows are
    divided into as many runs as samples are asked for, and of each run one is drawn.

    Args:
        data: what the recipe says about the data.
        reader: a tokenizer of transformers, or the :class:`Adapter` of models that transformers does not know.
        folder: what a relative path starts from: the recipe's folder.
        seed: of the draws.
        labels: whether to say which tokens are to be predicted: all of a text, the response to a prompt, what the
            assistant says in messages. Labels of an adapter are kept if they are asked for, and else left out.
        longest: the most tokens that the models take, if that is known.

    Raises:
        PlanError: the data cannot be read, hold too little, or lack labels; or samples are longer than ``longest``.
    """
    file = data.file(folder)
    if file is not None and (problem := fault(file, data.path, data.name, not isinstance(reader, Adapter))):
        raise PlanError(problem)
    if isinstance(reader, Adapter):
        if file is None:
            raise PlanError("an adapter reads files, not the Hub", data.name, "download the data set and name its path")
        parts: tuple[Batch, ...] = reader.batches(file, data, seed, labels)
        return _noted(Samples(data.name, parts), data, ())
    if longest is not None and data.max_length > longest:
        what = f"samples have {data.max_length} tokens, and the models take {longest} at most"
        raise PlanError(what, data.name, f"set `max_length: {longest}`")
    encoder = Encoder(reader, data.max_length, labels)
    rows: Sequence[Row]
    notes: tuple[str, ...] = ()
    if data.format == "text":
        assert file is not None
        rows = windows(_text(file), encoder, data, str(file), seed)
    else:
        rows, notes = chosen_rows(data, file, encoder, seed)
    padding = reader.pad_token_id
    parts = tuple(_tensors(row, labels) for row in rows)
    return _noted(Samples(data.name, parts, 0 if padding is None else padding), data, notes)


def _noted(samples: Samples, data: Data, notes: Sequence[str]) -> Samples:
    """The samples with what there is to know about them."""
    fewer = f"{data.name}: {len(samples)} samples, not the {data.samples} asked for"
    every = (*notes, *((fewer,) if len(samples) < data.samples else ()))
    return Samples(samples.name, samples.parts, samples.padding, every)


def _text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"is not UTF-8 text: byte {error.start}", str(file), "save it as UTF-8") from None
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror or error}", str(file)) from None
    if not text.strip():
        raise PlanError("the file is empty", str(file))
    return text


def _tensors(row: Row, labels: bool) -> Batch:
    import torch

    ids = torch.tensor([row.ids], dtype=torch.int64)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**made, "labels": torch.tensor([row.labels], dtype=torch.int64)} if labels else made


def open_tokenizer(place: str | os.PathLike[str], label: str, revision: str | None = None) -> Any:
    """The tokenizer of a model.

    Args:
        place: the model's folder, or ``org/name`` on the Hub.
        label: what the recipe calls the model.
        revision: a branch, tag or commit on the Hub.

    Raises:
        CheckpointError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    how = {"revision": revision or "main", "trust_remote_code": False}
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(os.fspath(place), **how)
    except Exception as error:  # of transformers, tokenizers or the Hub
        what = f"has no tokenizer that can be loaded: {first_line(error)}"
        raise CheckpointError(
            what, label, "name an `adapter` that reads the data, if it is no language model"
        ) from error
