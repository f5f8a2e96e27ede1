"""How well causal language models predict texts: nats a token and perplexity."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.checkpoint.locate import locate
from mergetool.errors import CheckpointError, PlanError, Problem
from mergetool.execute.devices import gpu_memory
from mergetool.plan.faults import listed
from mergetool.publish.loadable import first_line, quiet

_LONGEST = 2048  # tokens of a window, unless asked otherwise
_LOGITS = 1 << 28  # of one forward pass, at most; a large vocabulary lowers the batch
_SUMMED = 1 << 22  # logits turned into float64 at once
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Score:
    """How well one model predicts one text."""

    model: str
    data: str
    tokens: int
    """The tokens that were predicted."""
    nll: float
    """Nats a predicted token, on average."""

    @property
    def perplexity(self) -> float:
        """The exponential of :attr:`nll`; infinity where that is no float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def __str__(self) -> str:
        return f"{self.perplexity:.3f}" if self.perplexity < 1e6 else f"{self.perplexity:.0e}"


@gpu_memory()
def evaluate(
    models: Sequence[str | os.PathLike[str]],
    data: Mapping[str, Path],
    *,
    context: int | None = None,
    batch: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    limit: int | None = None,
) -> list[Score]:
    """Measure every model on every text.

    A text is tokenised as a whole, without special tokens, and cut into windows side by side. A window holds
    ``context`` tokens: its first is given, each of the others is predicted from those before it in the window.
    Where the tokenizer begins a text with a BOS token, each window is BOS and ``context`` - 1 tokens, all of them
    predicted. The last window may be shorter; alone with its first token it counts for nothing. Perplexities of
    models with different tokenizers do not compare: their tokens are not the same.

    Args:
        models: local folders, or ``org/name[@revision]`` on the Hub.
        data: UTF-8 text files by name.
        context: tokens of a window; by default what all the models can take, at most 2048.
        batch: windows in one forward pass, at most; the scores do not depend on it.
        device: where torch runs: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: what the weights are loaded in; the sums are float64.
        limit: of each text only so many tokens.

    Returns:
        The scores, model by model in the order given, and of each model text by text.

    Raises:
        CheckpointError: a model cannot be found or loaded in full, is no causal language model, or has no tokenizer.
        PlanError: a text cannot be read or is too short, or an argument is out of range.
    """
    texts = _texts(data)
    _check(context, batch, limit, device, dtype)
    with quiet():
        opened = [_open(os.fspath(model)) for model in models]
        context = _context(context, opened)
        return [
            score
            for model in opened
            for score in _measure(model, texts, context=context, batch=batch, device=device, dtype=dtype, limit=limit)
        ]


@dataclass(frozen=True)
class _Model:
    label: str
    config: Any
    place: Mapping[str, Any]  # how transformers is told where it is


def _texts(data: Mapping[str, Path]) -> dict[str, str]:
    problems: list[Problem] = []
    texts: dict[str, str] = {}
    for name, path in data.items():
        try:
            texts[name] = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            problems.append(Problem(f"is not UTF-8 text: byte {error.start}", str(path), "save it as UTF-8"))
        except OSError as error:
            problems.append(Problem(f"cannot be read: {error.strerror or error}", str(path)))
        else:
            if not texts[name].strip():
                problems.append(Problem("the text is empty", str(path)))
    if problems:
        raise PlanError(problems)
    return texts


def _check(context: int | None, batch: int, limit: int | None, device: str, dtype: str) -> None:
    import torch

    lowest = {"context": (context, 2), "batch": (batch, 1), "limit": (limit, 2)}
    problems = [
        Problem(f"{name} must be at least {low}, not {value}")
        for name, (value, low) in lowest.items()
        if value is not None and value < low
    ]
    if dtype not in _DTYPES:
        problems.append(Problem(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}"))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # what torch raises depends on how it was built
        problems.append(Problem(f"there is no device {device!r} here", fix="use cpu"))
    if problems:
        raise PlanError(problems)


def _open(label: str) -> _Model:
    """Read a model's config and refuse what is no causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = locate(label)
    if found.path is not None and not (found.path / "config.json").is_file():
        raise CheckpointError("holds no config.json", label, "name the folder of a model")
    place = {
        "pretrained_model_name_or_path": str(found.path or found.repo),
        "revision": found.revision or "main",
        "trust_remote_code": False,
    }
    try:
        config = AutoConfig.from_pretrained(**place)
    except Exception as error:  # also of the config's own checks
        raise CheckpointError(f"its config cannot be used: {first_line(error)}", label) from error
    known = AutoModelForCausalLM._model_mapping.get(type(config), None)
    names = {each.__name__ for each in (known if isinstance(known, tuple) else (known,)) if each is not None}
    stated = list(getattr(config, "architectures", None) or names)
    if not names.intersection(stated):
        what = f"is not a causal language model: {', '.join(stated) or config.model_type}"
        raise CheckpointError(what, label, "perplexity is defined for models that predict the next token")
    return _Model(label, config, place)


def _context(asked: int | None, models: Sequence[_Model]) -> int:
    shortest = _LONGEST
    for model in models:
        text = model.config.get_text_config()
        stated = (getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
        length = next((length for length in stated if isinstance(length, int) and length > 1), None)
        if asked is not None and length is not None and length < asked:
            raise PlanError(f"takes {length} tokens at most, not {asked}", model.label)
        shortest = min(shortest, length or shortest)
    return asked or shortest


def _measure(
    opened: _Model, texts: Mapping[str, str], *, context: int, batch: int, device: str, dtype: str, limit: int | None
) -> Iterator[Score]:
    tokenizer, model = _load(opened, device, dtype)
    first = tokenizer("a").input_ids[:1]
    bos = first if first == [tokenizer.bos_token_id] else []
    rows = max(1, min(batch, _LOGITS // (context * opened.config.get_text_config().vocab_size)))
    known = model.get_input_embeddings().weight.shape[0]
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:limit]
        if max(ids, default=0) >= known:
            raise CheckpointError(f"its tokenizer gives token {max(ids)}, the model knows {known}", opened.label)
        step = context - len(bos)
        cut = (bos + ids[start : start + step] for start in range(0, len(ids), step))
        windows = [window for window in cut if len(window) > 1]
        tokens = sum(len(window) - 1 for window in windows)
        if not tokens:
            raise PlanError("the text is too short to predict a single token", where=name)
        groups = (windows[start : start + rows] for start in range(0, len(windows), rows))
        yield Score(opened.label, name, tokens, math.fsum(x for g in groups for x in _nll(model, g, device)) / tokens)


def _nll(model: Any, windows: Sequence[Sequence[int]], device: str) -> list[float]:
    """The summed nats of each window's predicted tokens."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    # Padding stands on the right, where no token of a causal model sees it; any token will do.
    rows = [torch.tensor(window) for window in windows]
    padded = pad_sequence(rows, batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    with torch.inference_mode():
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
        step = max(1, _SUMMED // logits.shape[-1])
        totals = []
        for row, window in enumerate(windows):
            total = torch.zeros((), dtype=torch.float64, device=device)
            for start in range(0, len(window) - 1, step):
                stop = min(start + step, len(window) - 1)
                part, targets = logits[row, start:stop].double(), padded[row, start + 1 : stop + 1]
                total += cross_entropy(part, targets, reduction="sum")
            totals.append(float(total))
    return totals


def _load(opened: _Model, device: str, dtype: str) -> tuple[Any, Any]:
    """The tokenizer and the model, every weight of it from its files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    doing = "has no tokenizer that can be loaded"
    how = {"config": opened.config, "dtype": getattr(torch, dtype), "output_loading_info": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**opened.place)
        doing = "cannot be loaded"
        # Weights of another shape than the config's are asked about below, with those that are absent.
        model, loaded = AutoModelForCausalLM.from_pretrained(**opened.place, **how, ignore_mismatched_sizes=True)
    except Exception as error:  # of transformers, tokenizers, safetensors, torch or the model's own code
        raise CheckpointError(f"{doing}: {first_line(error)}", opened.label) from error
    # transformers fills these with random numbers, and goes on.
    absent = sorted({*loaded["missing_keys"], *(str(key[0]) for key in loaded["mismatched_keys"])})
    if absent:
        raise CheckpointError(f"lacks weights that its config asks for: {listed(absent)}", opened.label)
    return tokenizer, model.eval().to(device)


def table(scores: Sequence[Score]) -> str:
    """Nats a token, and under them perplexities, as plain text with a line for each model.

    The mean is that of the nats; the mean perplexity is its exponential.
    """
    models = list(dict.fromkeys(score.model for score in scores))
    names = list(dict.fromkeys(score.data for score in scores))
    found = {(score.model, score.data): score for score in scores}
    nats = [["nats a token", *names, "mean"]]
    perplexities = [["perplexity", *names, "mean"]]
    for model in models:
        row = [found.get((model, name)) for name in names]
        nlls = [score.nll for score in row if score is not None]
        cells = [*row, Score(model, "mean", 0, sum(nlls) / len(nlls))]
        nats.append([model, *("-" if score is None else f"{score.nll:.4f}" for score in cells)])
        perplexities.append([model, *(str(score or "-") for score in cells)])
    widths = [max(map(len, column)) for column in zip(*nats, *perplexities)]
    return "\n\n".join(_lines(rows, widths) for rows in (nats, perplexities))


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)
