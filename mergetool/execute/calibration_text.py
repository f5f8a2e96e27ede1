"""Texts as tokens: windows of a long one, single ones with what of them is to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergetool.errors import PlanError
from mergetool.kernels.random import draws, key
from mergetool.publish.loadable import first_line
from mergetool.recipe.data import Data

IGNORED = -100
"""The label of a token that is not to be predicted."""
Spans = Sequence[tuple[int, int]] | None
"""The stretches of a text that are to be predicted, in characters; None: all of it."""


@dataclass(frozen=True)
class Row:
    """The tokens of one sample."""

    ids: list[int]
    labels: list[int]
    """The same tokens, :data:`IGNORED` where nothing is to be predicted."""


def spread(count: int, wanted: int, seed: int) -> list[list[int]]:
    """``count`` things in as many runs as are wanted, at most one each; of each run, the order to try them in.

    Every run begins with one that is drawn, and goes on from there around the run.
    """
    wanted = min(count, wanted)
    runs = [range(i * count // wanted, (i + 1) * count // wanted) for i in range(wanted)]
    drawn = draws(key(seed, "calibration", "samples"), 0, wanted)
    firsts = [int(draw * len(run)) for draw, run in zip(drawn, runs, strict=True)]
    return [[*run[first:], *run[:first]] for first, run in zip(firsts, runs, strict=True)]


def windows(text: str, encoder: Encoder, data: Data, where: str, seed: int) -> list[Row]:
    """Windows of a text, of equal length, each between the special tokens that the tokenizer puts around a text.

    Raises:
        PlanError: the text does not fill a single window.
    """
    before, after = encoder.around
    step = data.max_length - len(before) - len(after)
    ids = encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if step < 1 or len(ids) < step:
        what = f"the text has {len(ids)} tokens, fewer than one window of {max(step, 1)}"
        fix = f"add text, or lower `max_length` of `{data.name}`"
        if step < 1:
            what = f"windows of {data.max_length} tokens have no room but for the tokenizer's special tokens"
            fix = f"set `max_length` of `{data.name}` higher"
        raise PlanError(what, where, fix)
    rows = []
    for window, *_ in spread(len(ids) // step, data.samples, seed):
        inner = ids[window * step : (window + 1) * step]
        labels = [IGNORED] * len(before) + inner + [IGNORED] * len(after)
        rows.append(Row([*before, *inner, *after], labels))
    return rows


@dataclass(frozen=True)
class Encoder:
    """A tokenizer of transformers with what is asked of it."""

    tokenizer: Any
    length: int
    """Tokens of a row, at most."""
    labels: bool
    """Whether it matters what is to be predicted."""

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after every text."""
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        full = self.tokenizer("a").input_ids
        starts = range(len(full) - len(bare) + 1)
        start = next((i for i in starts if full[i : i + len(bare)] == bare), 0)
        return full[:start], full[start + len(bare) :]

    def row(self, text: str, spans: Spans = None, special: bool = True) -> Row | None:
        """The tokens of a text; None where there is nothing in it, or nothing to predict though it is asked for.

        Args:
            text: the text.
            spans: what of it is to be predicted.
            special: whether the tokenizer adds its special tokens.
        """
        marked = self.labels and spans is not None
        told = {"return_offsets_mapping": True} if marked else {}
        how = {"add_special_tokens": special, "truncation": True, "max_length": self.length, "verbose": False}
        found = self.tokenizer(text, **how, **told)
        ids = list(found.input_ids)
        if not text.strip() or not ids:
            return None
        labels = ids
        if marked:
            offsets = found["offset_mapping"]
            labels = [i if _within(offset, spans or ()) else IGNORED for i, offset in zip(ids, offsets, strict=True)]
        return None if self.labels and set(labels) == {IGNORED} else Row(ids, labels)

    @property
    def tells(self) -> bool:
        """Whether the tokenizer can tell which characters a token stands for."""
        return bool(getattr(self.tokenizer, "is_fast", False))

    def conversation(self, messages: Sequence[Mapping[str, Any]], where: str) -> tuple[str, Spans]:
        """Messages as the chat template writes them, and what in them the assistant says.

        The spans are None where the template does not write a conversation by adding to what came before.

        Raises:
            PlanError: the tokenizer has no template, or it refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            fix = "use a model whose tokenizer has one, or write the conversation as `text`"
            raise PlanError("`messages` need a chat template, and the tokenizer has none", where, fix)
        try:
            full = self._written(messages)
        except Exception as error:  # a template raises what it likes
            raise PlanError(f"the chat template refuses the messages: {first_line(error)}", where) from error
        spans = self._said(messages, full) if self.labels and self.tells else None
        return full, spans

    def _written(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
        found: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return found

    def _said(self, messages: Sequence[Mapping[str, Any]], full: str) -> Spans:
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._written(messages[:i], prompt=True) if i else ""
                until = self._written(messages[: i + 1])
            except Exception:  # it does not write parts of a conversation
                return None
            if not (full.startswith(before) and full.startswith(until)):
                return None
            spans.append((len(before), len(until)))
        return spans or None


def _within(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    start, stop = offset
    return start < stop and any(first <= start < last for first, last in spans)
