"""Twins whose units were shuffled at random come back through the command line, to the bit, in every family."""

from __future__ import annotations

import json

import numpy as np
import pytest
from anatomy.symmetric import made, outputs, random_permutations, turned
from click.testing import CliRunner

from execute.conftest import tensors
from execute.test_align import noisy, save, words
from mergetool.anatomy import DEFAULT_KINDS
from mergetool.cli.group import mergetool

FAMILIES = ["gpt2", "bert_classifier", "vit", "gqa", "mistral", "qwen2", "qwen3", "mixtral", "olmoe_experts"]
"""``gqa`` is a Llama with three groups of four query heads."""
KINDS = ("mlp", "heads", "vo", "experts", "residual")
RECIPE = """\
merge_method: linear
models:
  - {model: first, parameters: {weight: 0}}
  - {model: second, parameters: {weight: 1}}
align: {reference: first, method: METHOD, groups: GROUPS, margin: MARGIN}
"""
WORDS = "calibration: {data: {words: {path: words.txt, samples: 48, max_length: 32}}}\n"
PIXELS = "calibration: {adapter: images.py, data: {words: {path: words.txt, samples: 64}}}\n"
IMAGES = """
import torch
from transformers import ViTConfig, ViTForImageClassification


def network(config):
    return ViTForImageClassification(ViTConfig.from_dict(config))


def read(path, samples, seed):
    random = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(8, 3, 16, 16, generator=random)} for _ in range(max(1, samples // 8))]
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Facts of their own; the compiled kernels are everybody's."""
    monkeypatch.setattr("mergetool.execute.fact_making.cache_folder", lambda kind: tmp_path / "facts")


def shuffled(folder, name, kinds):
    """The folders ``first`` and ``second``, which is the same model in another order of all its units."""
    model = made(name)
    groups = model.groups(kinds)
    save(folder / "first", model.tensors, model.config)
    save(folder / "second", turned(model.tensors, groups, random_permutations(groups, seed=11)), model.config)
    return model, groups


def merged(folder, recipe):
    """What the command makes of a recipe: the output folder and what is said."""
    (folder / "merge.yaml").write_text(recipe)
    command = ["run", str(folder / "merge.yaml"), str(folder / "merged"), "--trust-code", "--quiet"]
    ran = CliRunner().invoke(mergetool, command, prog_name="mergetool")
    assert ran.exit_code == 0, ran.stderr
    return {name: values for name, (_, values) in tensors(folder / "merged").items()}, ran.stdout


def assert_recovered(folder, name, kinds, method, margin, data=""):
    """Merge nothing but the shuffled twin, turned: it is the original, and computes what that does.

    ``method`` may have other keys of ``align`` behind it.
    """
    model, groups = shuffled(folder, name, kinds)
    found_of = json.dumps(sorted({group.kind for group in groups}))
    recipe = data + RECIPE.replace("METHOD", method).replace("GROUPS", found_of).replace("MARGIN", str(margin))
    found, said = merged(folder, recipe)

    assert found.keys() == model.tensors.keys()
    for key, values in model.tensors.items():
        np.testing.assert_array_equal(found[key].view(values.dtype), values, err_msg=key)
    assert np.abs(outputs(model, found) - outputs(model, model.tensors)).max() < 1e-4
    assert "not checked" not in said
    gains = [line for line in said.splitlines() if " of a perfect match, " in line]
    assert len(gains) == len({group.kind for group in groups})
    assert all(float(gain.split(" → ")[1][:5]) > 0.99 for gain in gains)


@pytest.mark.parametrize("name", FAMILIES)
def test_by_weights(tmp_path, name):
    assert_recovered(tmp_path, name, KINDS, "weight_matching", 0.01)


@pytest.mark.parametrize("score", ["correlation", "inner_product"])
@pytest.mark.parametrize("name", FAMILIES)
def test_by_activations(tmp_path, name, score):
    # Heads of random weights attend to everything alike: what they put out hardly differs, but where it does is exact.
    if name == "vit":
        (tmp_path / "images.py").write_text(IMAGES)
        (tmp_path / "words.txt").write_text("none of this is read")
    else:
        words(tmp_path)
    method = f"activation_matching, score: {score}"
    assert_recovered(tmp_path, name, DEFAULT_KINDS, method, 0, PIXELS if name == "vit" else WORDS)


@pytest.mark.parametrize(
    "method",
    [
        "weight_matching",
        "activation_matching, score: correlation",
        "activation_matching, score: inner_product",
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "gqa", "mixtral"])
def test_a_fine_tune_is_left_as_it_is(tmp_path, name, method):
    model = made(name)
    tuned = noisy(model.tensors, 0.005)
    save(tmp_path / "first", model.tensors, model.config)
    save(tmp_path / "second", tuned, model.config)
    words(tmp_path)
    recipe = WORDS + RECIPE.replace("METHOD", method).replace("GROUPS", json.dumps(DEFAULT_KINDS))
    found, said = merged(tmp_path, recipe.replace("MARGIN", "0.01"))
    for key, values in tuned.items():
        np.testing.assert_array_equal(found[key].view(values.dtype), values, err_msg=key)
    assert "second: faces the reference already, nothing is turned" in said
