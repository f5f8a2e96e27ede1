"""Two tiny models beside their base, a recipe that merges them, and the command line to run it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mergetool.cli.group import mergetool
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.shards import shard
from mergetool.storage.writer import Writer

RECIPE = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters: {weight: [0.0, 1.0]}
parameters:
  density: 0.5
rules:
  - where: {part: norm}
    keep: a
"""


def model(folder, seed):
    """A llama of two layers whose numbers come from the seed."""
    numbers = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,), "lm_head.weight": (32, 8)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (8, 16)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (8,)
    folder.mkdir()
    (part,) = shard([(name, DTYPES["F32"], shape) for name, shape in shapes.items()], 1 << 30)
    with Writer(folder / part.file, part) as writer:
        for entry in part.header.entries.values():
            writer.write(numbers.standard_normal(entry.size, dtype=np.float32), entry.start)
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 32, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: models ``base``, ``a`` and ``b``, and ``merge.yaml``."""
    for seed, name in enumerate(("base", "a", "b")):
        model(tmp_path / name, seed)
    (tmp_path / "merge.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MERGETOOL_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def run():
    """Call the command line; the result has ``exit_code``, ``stdout`` and ``stderr``."""

    def call(*arguments):
        return CliRunner().invoke(mergetool, [str(a) for a in arguments], prog_name="mergetool")

    return call
