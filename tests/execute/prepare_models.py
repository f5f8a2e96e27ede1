"""Tiny language models with a tokenizer and texts, and methods that ask for facts; for tests of what is prepared."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import types
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from execute.forward.tiny import save
from mergetool.methods import METHODS
from mergetool.plan import build
from mergetool.recipe import load

WORDS = [f"w{i}" for i in range(3, 60)]
RECIPE = """\
merge_method: METHOD
base_model: base
models:
  - {model: a, data: first}
  - {model: b, data: second}
parameters: {weight: 0.5}
calibration:
  data:
    first: {path: first.txt, samples: 6, max_length: 8}
    second: {path: second.txt, samples: 6, max_length: 8}
"""
TRAIN = "train: {steps: 4, batch_tokens: 32, every: 2, topk: 0, held_out: 0, learning_rate: 0.05}\n"


def tokenizer(folder):
    """Save a tokenizer with a token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    made = Tokenizer(models.WordLevel(numbers, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def models(folder, name="llama"):
    """The models ``base``, ``a`` and ``b`` with tokenizers, and a text for each of the latter."""
    save(name, folder / "base")
    base = load_file(folder / "base" / "model.safetensors")
    for seed, label in enumerate(("a", "b"), 1):
        random = torch.Generator().manual_seed(seed)
        moved = {key: t + 0.02 * torch.randn(t.shape, generator=random) for key, t in base.items()}
        (folder / label).mkdir()
        save_file(moved, folder / label / "model.safetensors", {"format": "pt"})
        (folder / label / "config.json").write_text((folder / "base" / "config.json").read_text())
    for label in ("base", "a", "b"):
        tokenizer(folder / label)
    for seed, text in enumerate(("first", "second")):
        words = np.random.default_rng(seed).choice(WORDS, 200)
        (folder / f"{text}.txt").write_text(" ".join(words))
    return folder


def planned(folder, method, more="", change=(), **options):
    """The plan of a merge of the three."""
    path = folder / "merge.yaml"
    text = RECIPE.replace("METHOD", method) + more
    path.write_text(text.replace(*change) if change else text)
    return build(load(path), **options)


def asking(monkeypatch, method, **facts):
    """Let a method ask for facts: argument → kind."""
    made = copy.copy(METHODS[method])
    object.__setattr__(made, "facts", facts)
    monkeypatch.setitem(METHODS, method, made)


@pytest.fixture
def known(monkeypatch):
    """What jobs are told in, where the module of jobs that are told is not there."""
    if importlib.util.find_spec("mergetool.execute.known") is None:
        stub = types.ModuleType("mergetool.execute.known")
        stub.Extra, stub.Gram = namedtuple("Extra", "values axes"), namedtuple("Gram", "values axis")
        monkeypatch.setitem(sys.modules, stub.__name__, stub)


class Told:
    """A progress that remembers what was begun."""

    def __init__(self):
        self.labels = []

    def start(self, total, label):
        assert total > 0
        self.labels.append(label)

    def advance(self, nbytes):
        assert nbytes >= 0

    def close(self):
        pass


def about(folder):
    """What a folder of facts says about itself."""
    return json.loads((folder / "facts.json").read_text())
