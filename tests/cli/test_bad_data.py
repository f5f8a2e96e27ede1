"""What cannot be measured, matched or trained is told through the command line: where, what, and what to do."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from execute.conftest import contents
from execute.prepare_models import TRAIN, models
from safetensors.numpy import load_file, save_file

from mergetool.execute import run as execute
from mergetool.plan import build
from mergetool.recipe import load

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
SOURCES = "models: [{model: a, data: first}, {model: b, data: second}]\n"
DATA = """\
calibration:
  data:
    first: {path: first.txt, samples: 6, max_length: 8}
    second: {path: second.txt, samples: 6, max_length: 8}
"""
RECIPES = {
    "regmean": f"merge_method: regmean\n{SOURCES}{DATA}",
    "fisher": f"merge_method: fisher\n{SOURCES}{DATA}",
    "dam": f"merge_method: dam\nbase_model: base\n{SOURCES}{DATA}{TRAIN}",
    "activations": f"merge_method: linear\n{SOURCES}parameters: {{weight: 0.5}}\n{DATA}"
    "align: {method: activation_matching, reference: a}\n",
    "weights": "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n"
    "align: {method: weight_matching, reference: a}\n",
}
RUN_MODELS = ("regmean", "fisher", "dam", "activations")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return models(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def merge(shared, tmp_path, monkeypatch, run):
    """Merge copies of the models, changed, by one of the recipes."""
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mergetool.execute.fact_making.cache_folder", lambda kind: tmp_path / "facts")

    def merged(name, text=None):
        (tmp_path / "merge.yaml").write_text(text or RECIPES[name])
        return run("run", "merge.yaml", "merged", "--quiet", "--force")

    return merged


def change(folder, **tensors):
    """Change tensors of a model, told by functions of them."""
    held = load_file(folder / "model.safetensors")
    save_file({k: tensors.get(k.replace(".", "_"), lambda x: x)(v) for k, v in held.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip


def spoilt(values):
    values = values.copy()
    values[2, 3] = np.nan
    return values


def silent(values):
    values = values.copy()
    values[5] = 0
    return values


@pytest.mark.parametrize("name", RUN_MODELS)
def test_an_architecture_that_nobody_knows(name, merge, tmp_path):
    for label in ("base", "a", "b"):
        path = tmp_path / label / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "model_type": "martian", "architectures": ["MartianModel"]}))
    result = merge(name)
    assert result.exit_code == 3
    assert "has model type `martian` in its config, which transformers does not know" in result.stderr
    assert "write an adapter (`calibration.adapter`)" in result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_weight_that_is_not_finite(name, merge, tmp_path):
    change(tmp_path / "b", **{UP.replace(".", "_"): spoilt})
    result = merge(name)
    assert result.exit_code == 4
    assert f"b: {UP}: the weight holds a NaN or an infinity" in result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("regmean", "b: model.layers.1: the output of its module holds a NaN or an infinity"),
        ("activations", "b: model.layers.1: the output of its module holds a NaN or an infinity"),
        ("fisher", "b: what the network predicts holds a NaN or an infinity"),
        ("dam", "the loss of step 1 is nan"),
    ],
)
def test_activations_that_are_not_finite(name, what, merge, tmp_path):
    large = {key.replace(".", "_"): lambda x: x * np.float32(1e30) for key in (UP, DOWN)}
    change(tmp_path / "b", **large)
    result = merge(name)
    assert result.exit_code == 4
    assert what in result.stderr
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_units_that_never_vary_are_no_trouble(name, merge, tmp_path):
    for label in ("a", "b"):
        change(tmp_path / label, **{UP.replace(".", "_"): silent})
    result = merge(name)
    assert result.exit_code == 0, result.stderr
    for values in load_file(tmp_path / "merged" / "model.safetensors").values():
        assert np.isfinite(values).all()


def test_four_models_are_aligned_with_one(merge, tmp_path):
    for i, label in enumerate(("c", "d")):
        shutil.copytree(tmp_path / "b", tmp_path / label)
        order = np.random.default_rng(i).permutation(24)
        keys = {f"model.layers.{n}.mlp.{p}_proj.weight" for n in range(3) for p in ("gate", "up")}
        turned = {key.replace(".", "_"): lambda x, order=order: x[order] for key in keys}
        columns = {
            f"model_layers_{n}_mlp_down_proj_weight": lambda x, order=order: np.ascontiguousarray(x[:, order])
            for n in range(3)
        }
        change(tmp_path / label, **turned, **columns)
    text = RECIPES["weights"].replace("models: [", "models: [{model: c}, {model: d}, ")
    result = merge("weights", text)
    assert result.exit_code == 0, result.stderr
    assert "c: mlp turned: " in result.stdout
    assert "d: mlp turned: " in result.stdout
    assert "b: faces the reference already, nothing is turned" in result.stdout
    four = contents(tmp_path / "merged")["model.safetensors"]
    for label in ("c", "d"):
        shutil.rmtree(tmp_path / label)
        shutil.copytree(tmp_path / "b", tmp_path / label)
    assert merge("weights", text).exit_code == 0
    assert contents(tmp_path / "merged")["model.safetensors"] == four


def test_two_runs_that_want_the_same_facts_measure_once(merge, tmp_path):
    (tmp_path / "merge.yaml").write_text(RECIPES["regmean"])
    plan = build(load(tmp_path / "merge.yaml"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: execute(plan, tmp_path / name), ("one", "two")))
    one, two = (contents(tmp_path / name)["model.safetensors"] for name in ("one", "two"))
    assert one == two
    assert len([path for path in (tmp_path / "facts").glob("gram-*") if path.is_dir()]) == 2
