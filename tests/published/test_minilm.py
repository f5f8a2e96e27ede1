"""all-MiniLM-L6-v2 and a published fine-tune of it, merged by the recipes of `examples/minilm`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import mergetool
from mergetool.cli.group import mergetool as command
from mergetool.kernels import random

from .conftest import RECIPES, Published

pytestmark = pytest.mark.slow

NAMES = ["linear", "slerp", "task-arithmetic", "ties", "dare-ties"]
BUFFER = "embeddings.position_ids"
CARRIED = [
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
]


@pytest.fixture(scope="module")
def merged(published: Published, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every recipe's merged folder."""
    home = tmp_path_factory.mktemp("minilm")
    return {name: mergetool.run(mergetool.build(published.recipe(name)), home / name).output for name in NAMES}


def expected(name: str, recipe: Any, tensor: str, base: Any, sre: Any) -> Any:
    """One tensor in float64, from the numbers that stand in the recipe."""
    if name == "linear":
        return oracles.linear([base, sre], [0.5, 0.5])
    if name == "slerp":
        return oracles.slerp(base, sre, slerp_t(tensor))
    if name == "task-arithmetic":
        return oracles.task_arithmetic(base, [sre], 0.25)
    if name == "ties":
        return oracles.ties(base, [sre], weight=1.0, density=0.5, lambda_=0.5)
    key = random.key(7, recipe.sources[-1], tensor)
    mask = random.draws(key, 0, base.size).reshape(base.shape) < 0.5
    return oracles.dare(base, [sre], [mask], weight=0.5, density=0.5, consensus=True)


def slerp_t(tensor: str) -> float:
    """A gradient from 0.25 to 0.75 over six layers, and 0.5 outside them.

    In the form in which gradients are defined, to the last bit: where the models are ten units in the last place
    apart, t = 0.35 meets a midpoint of float32, and 2e-17 decide to which side it is rounded.
    """
    place = tensor.split(".")
    if place[:2] != ["encoder", "layer"]:
        return 0.5
    depth = int(place[2]) / 5
    return (1 - depth) * 0.25 + depth * 0.75


def test_the_recipes_are_those_of_the_folder() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_oracle_rounded_once(name: str, published: Published, merged: dict[str, Path]) -> None:
    base, sre = (load_file(folder / "model.safetensors") for folder in (published.base, published.sre))
    found = load_file(merged[name] / "model.safetensors")
    recipe = published.recipe(name)
    assert found.keys() == base.keys()
    for tensor in sre:
        exact = expected(name, recipe, tensor, base[tensor], sre[tensor])
        assert found[tensor].dtype == np.float32
        np.testing.assert_array_equal(found[tensor], exact.astype(np.float32), err_msg=tensor)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_weight_survives(name: str, published: Published, merged: dict[str, Path]) -> None:
    folder = merged[name]
    before, after = (load_file(at / "model.safetensors")[BUFFER] for at in (published.base, folder))
    assert BUFFER not in load_file(published.sre / "model.safetensors")
    assert after.dtype == before.dtype == np.int64
    np.testing.assert_array_equal(after, before)
    for file in CARRIED:
        assert (folder / file).read_bytes() == (published.base / file).read_bytes(), file
    given, written = (json.loads((at / "config.json").read_text()) for at in (published.base, folder))
    assert given.items() <= written.items()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_it(name: str, merged: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, report = AutoModel.from_pretrained(merged[name], output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) <= {BUFFER}  # newer versions make it themselves
    tokens = AutoTokenizer.from_pretrained(merged[name])("pod keeps crashing", return_tensors="pt")
    with torch.inference_mode():
        assert torch.isfinite(model(**tokens).last_hidden_state).all()


def test_the_command_line_merges_and_verifies(published: Published, merged: dict[str, Path], tmp_path: Path) -> None:
    overrides = [word for place in published.places("ties") for word in ("--set", place)]
    recipe = str(RECIPES / "ties.yaml")
    run = CliRunner().invoke(command, ["run", recipe, str(tmp_path / "ties"), "--quiet", *overrides])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "ties/model.safetensors").read_bytes() == (merged["ties"] / "model.safetensors").read_bytes()
    verify = CliRunner().invoke(command, ["verify", str(tmp_path / "ties"), "--sample", "104"])
    assert verify.exit_code == 0, verify.output
    assert "104 of 104 tensors made again, the same bytes" in verify.output
