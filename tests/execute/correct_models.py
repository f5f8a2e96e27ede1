"""Tiny models with correct recipes, and what their activations have as transformers runs them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from execute.prepare_models import models
from mergetool.execute.calibration import open_tokenizer, read
from mergetool.facts.correction import Moments
from mergetool.plan import build
from mergetool.recipe import load

RECIPE = """\
merge_method: linear
models:
  - {model: a, data: first}
  - {model: b, data: second}
parameters: {weight: 0.5}
dtype: float32
calibration:
  data:
    first: {path: first.txt, samples: 6, max_length: 8}
    second: {path: second.txt, samples: 6, max_length: 8}
"""
REPAIR = "correct: {method: repair}\n"
TACT = "correct: {method: tact, scope: all}\n"


def planned(folder, more=REPAIR, change=(), **options):
    """The plan of a corrected merge of ``a`` and ``b``."""
    path = folder / "correct.yaml"
    text = RECIPE.replace(*change) if change else RECIPE
    weighted = not any(method in text for method in ("dam", "greedy_soup"))
    path.write_text((text if weighted else text.replace("parameters: {weight: 0.5}\n", "")) + more)
    return build(load(path), **options)


def made(folder, name="llama"):
    """The models of a kind in a folder; a Mistral is a Llama whose config has no biases to switch on."""
    folder.mkdir()
    models(folder, "llama" if name == "mistral" else name)
    for label in ("base", "a", "b") if name == "mistral" else ():
        file = folder / label / "config.json"
        config = json.loads(file.read_text())
        kept = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
        named = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        file.write_text(json.dumps({**kept, **named}))
    return folder


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    return models(tmp_path_factory.mktemp("correct"))


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """Where this test's facts are, and nobody else's."""
    folder = tmp_path / "facts"
    monkeypatch.setattr("mergetool.execute.fact_making.cache_folder", lambda kind: folder)
    return folder


def kept(facts, kind="correction"):
    """The finished folders of a kind."""
    return sorted(path for path in facts.glob(f"{kind}-*") if path.is_dir())


def tensors(folder):
    """The tensors of a model folder."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def loaded(folder, kind="AutoModelForCausalLM"):
    """A model folder as transformers has it; every tensor has its place."""
    import transformers

    model, said = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    return model.eval()


def batches(plan, *names):
    """The batches of calibration data, as the merge has them."""
    folder = plan.recipe.folder
    data = [each for each in plan.recipe.calibration.data if each.name in (names or ("first", "second"))]
    tokenizer = open_tokenizer(folder / "a", "a")
    return [batch for each in data for batch in read(each, tokenizer, folder, plan.recipe.seed).batches()]


def moments(model, path, batches, side="output"):
    """What a module gives or is given, over all tokens, in float64."""
    rows = []

    def keep(module, args, output):
        rows.append((output if side == "output" else args[0]).detach().double())

    handle = model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    values = np.concatenate([each.reshape(-1, each.shape[-1]).numpy() for each in rows])
    return Moments(values.mean(0), values.std(0), len(values))


def spread_of(folder):
    """The ratios that a correction has kept."""
    return json.loads((folder / "spread.json").read_text())
