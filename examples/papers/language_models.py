"""The bundled language models and their texts, and how much of the specialists' gain any weights recover."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

HERE = Path(__file__).parents[1]
MODELS = HERE / "models"
DOMAINS = ("python", "speeches", "spanish")
WINDOW = 256
LONGEST = 3_000_000  # characters of a domain that calibration data are drawn from

Weights = dict[str, torch.Tensor]


def load(folder: Path) -> Weights:
    """A model's weights in float32, of a folder whose tensors are in one file."""
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def held_out(split: str, name: str) -> str:
    """A bundled text: of the `validation` or of the `test` split."""
    folder = HERE / "data" / "validation" if split == "validation" else HERE / "data"
    return (folder / f"{name}.txt").read_text("utf-8")


def windows(text: str) -> torch.Tensor:
    """A text as [windows, WINDOW] tokens; what is left over at its end is not used."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base", model_max_length=10**9)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def trainer() -> ModuleType:
    """The script that trained the models, which also fetches their texts."""
    sys.path.insert(0, str(MODELS))
    import train

    return train


def specialists_texts(cache: Path) -> dict[str, str]:
    """What each specialist was trained on, up to LONGEST characters, out of the packages in the cache."""
    corpora = trainer().gather(cache)
    return {name: "".join(corpora[name].for_specialist)[:LONGEST] for name in DOMAINS}


@dataclass(frozen=True)
class Score:
    """What weights are worth on one split.

    Attributes:
        nll: mean nats a token of each domain, in the order of DOMAINS.
        recovered: (base - merged) / (base - the domain's own specialist), of each domain.
    """

    nll: tuple[float, ...]
    recovered: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Recovered on average."""
        return sum(self.recovered) / len(self.recovered)

    @property
    def worst(self) -> float:
        """Recovered of the domain that comes off worst."""
        return min(self.recovered)


class Bench:
    """The models, and how well any weights predict the texts.

    Attributes:
        texts: split → domain → [windows, WINDOW] tokens.
        base: the base's weights.
        specialists: those of each domain's specialist.
        module: a module that runs any of them.
    """

    def __init__(self, texts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.texts = texts
        self.base = load(MODELS / "base")
        self.specialists = {name: load(MODELS / name) for name in DOMAINS}
        self.module = LlamaForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
        self._levels = {
            split: [(self._nll(self.base, split, n), self._nll(self.specialists[n], split, n)) for n in DOMAINS]
            for split in texts
        }

    def score(self, weights: Weights, split: str) -> Score:
        """What these weights are worth on a split, rounded to bfloat16."""
        nll = tuple(self._nll(weights, split, name) for name in DOMAINS)
        pairs = zip(self._levels[split], nll, strict=True)
        return Score(nll, tuple((base - found) / (base - own) for (base, own), found in pairs))

    def _nll(self, weights: Weights, split: str, name: str) -> float:
        """Mean nats a token; each window's first token is given."""
        rounded = {key: tensor.bfloat16().float() for key, tensor in weights.items()}
        self.module.load_state_dict(rounded, strict=False)
        text = self.texts[split][name]
        with torch.inference_mode():
            total = sum(float(self.module(input_ids=few, labels=few).loss) * len(few) for few in text.split(16))
        return total / len(text)
