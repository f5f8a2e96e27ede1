"""Recipes from files, texts and mergekit; nothing but RecipeError ever comes out."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.errors import RecipeError
from mergetool.methods import METHODS
from mergetool.recipe import load, read
from mergetool.recipe.load import LARGEST

from .full import FULL, STAGES

LINEAR = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
"""
SLERP = """
models:
  - model: psmathur/orca_mini_v3_13b
  - model: garage-bAInd/Platypus2-13B
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
TIES = """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
DARE = """
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: EmbeddedLLM/Mistral-7B-Merge-14-v0.2@main
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
tokenizer_source: base
parameters:
  int8_mask: true
dtype: bfloat16
out_dtype: float32
"""
ARITHMETIC = """
base_model:
  model:
    path: org/base
    revision: main
models:
  - model: &first
      model: {path: org/first}
    parameters: &same
      weight: 5e-1
  - model: org/second
    parameters: *same
  - model: {model: org/third, lora: {path: org/adapter}}
    parameters:
      <<: *same
merge_method: task_arithmetic
parameters:
tokenizer_source: *first
"""


def test_linear():
    recipe = load(LINEAR)
    assert recipe.base_model is None
    assert len(recipe.sources) == 3
    values = recipe.parameters_for(recipe.method(), "x", 0.0, recipe.sources).values
    assert values == {"weight": (1.0, 0.3, 0.5), "normalize": True}


@pytest.mark.parametrize(
    ("name", "depth", "t"),
    [("self_attn", 0.0, 0.0), ("self_attn", 0.5, 0.3), ("mlp", 0.125, 0.75), ("lm_head", 0.9, 0.5)],
)
def test_slerp(name, depth, t):
    recipe = load(SLERP)
    sources = recipe.merged_by(recipe.method())
    assert sources == ("garage-bAInd/Platypus2-13B",)
    assert recipe.parameters_for(recipe.method(), name, depth, sources).values == {"t": pytest.approx(t)}
    alone = load(SLERP.replace("  - model: psmathur/orca_mini_v3_13b\n", ""))
    assert alone.merged_by(alone.method()) == sources
    assert set(alone.sources) == set(recipe.sources)


def test_ties():
    recipe = load(TIES)
    values = recipe.parameters_for(recipe.method(), "mlp", 0.5, recipe.merged_by(recipe.method())).values
    assert values["weight"] == pytest.approx((1.0, 0.5, 0.5))
    assert values["density"] == pytest.approx((0.7, 0.5, 0.33))
    assert values["normalize"] is True
    assert "int8_mask" not in values


def test_dare():
    recipe = load(DARE)
    assert recipe.sources[0] == "mistralai/Mistral-7B-v0.1"
    assert len(recipe.merged_by(recipe.method())) == 2
    assert recipe.stored_dtype == "float32"


def test_task_arithmetic_with_anchors_and_mappings():
    recipe = load(ARITHMETIC)
    assert recipe.sources == ("org/base@main", "org/first", "org/second", "org/third+org/adapter")
    assert recipe.tokenizer_source == "org/first"
    values = recipe.parameters_for(recipe.method(), "x", 0.0, recipe.merged_by(recipe.method())).values
    assert values["weight"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_loads_with_its_required_parameters(name):
    method = METHODS[name]
    count = max(method.fewest, 1)
    required = {p.name: p.choices[0] if p.choices else p.type(1) for p in method.parameters.values() if p.required}
    text = f"merge_method: {name}\nbase_model: base\nparameters: {required}\nmodels:\n".replace("True", "true")
    recipe = load(text + "".join(f"  - model: m{i}\n" for i in range(count)))
    sources = recipe.merged_by(method)
    found = recipe.parameters_for(method, "x", 0.5, sources)
    assert len(sources) == count
    assert found.problems == ()
    assert set(found.values) == set(method.parameters)


def test_files(tmp_path):
    (tmp_path / "recipe.yaml").write_text(FULL)
    assert load(str(tmp_path / "recipe.yaml")).folder == tmp_path
    cases = {
        tmp_path / "recpie.yaml": ("there is no such file", "did you mean `recipe.yaml`?"),
        tmp_path / "no" / "recipe.yaml": ("there is no such file", f"there is no folder {tmp_path / 'no'} either"),
        tmp_path: ("a folder is not a recipe", "name the YAML file in it"),
        tmp_path / "recipe.yaml" / "x": ("the recipe cannot be read: Not a directory", ""),
    }
    for path, (what, fix) in cases.items():
        recipe, (problem,) = read(path)
        assert recipe is None
        assert (problem.what, problem.where, problem.fix) == (what, str(path), fix)


def test_bytes(tmp_path):
    assert load(b"\xef\xbb\xbf" + FULL.encode()).seed == 7
    _, (problem,) = read("a: ü\nb: é".encode() + b"\xff")
    assert (problem.where, problem.what) == ("<text>:2:5", "the recipe is not UTF-8 text")
    file = tmp_path / "big.yaml"
    file.write_bytes(b"# " + b"x" * LARGEST)
    _, (problem,) = read(file)
    assert problem.what == "a recipe of more than 10 MB is not read"


@given(st.one_of(st.text(), st.binary(), st.text(alphabet="ab:-[]{}&*!<>|?\n \"'#,", max_size=80)))
@settings(max_examples=300, deadline=1000)
def test_anything_is_a_recipe_or_a_recipe_error(text):
    recipe, problems = read(text)
    if recipe is None or problems:
        with pytest.raises(RecipeError):
            load(text)


KEYS = st.sampled_from(["value", "filter", "model", "path", "part", "weight", "data", "method"])
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from(["ties", "base", "mlp", "0-1", ""])
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=6,
)


@given(st.data(), st.sampled_from([FULL, STAGES]))
@settings(max_examples=400, deadline=1000)
def test_any_value_anywhere_is_a_recipe_or_a_recipe_error(data, text):
    """Put arbitrary values at arbitrary places of a full recipe."""
    tree = yaml.safe_load(text)
    for _ in range(data.draw(st.integers(1, 3))):
        node = tree
        while isinstance(node, dict | list) and node:
            step = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[step], dict | list) or data.draw(st.booleans()):
                node[step] = data.draw(VALUES)
                break
            node = node[step]
    _, problems = read(yaml.safe_dump(tree))
    assert all(problem.where.startswith("<text>:") for problem in problems)
    assert all("‹" not in problem.what for problem in problems)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\n" + "".join(f"k{i}: 1\n" for i in range(60_000)),
        "merge_method: ties\nmodels:\n" + "  - model: a\n" * 60_000,
        "merge_method: ties\nmodels:\n" + "  - 3\n" * 60_000,
        "merge_method: linear\nmodels:\n" + "".join(f"  - model: a{i}\n" for i in range(30_000)),
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [" + "x, " * 100_000 + "]}",
        "a: " + "x" * 9_000_000,
        "x" * 9_000_000 + ": 1",
        "[" * 9_000_000,
        "\n" + "[" * 9_000_000,
        "- " * 4_000_000 + "\n",
        "{" * 9_000_000,
        "\n" + "? " * 4_000_000 + "\n",
    ],
    ids=["keys", "twins", "numbers", "models", "gradient", "value", "key", "path", "lists", "dashes", "maps", "marks"],
)
def test_hostile_texts_are_refused_quickly(text):
    start = time.perf_counter()
    _, problems = read(text)
    assert problems
    assert len(problems) <= 101
    assert max(len(str(problem)) for problem in problems) < 1000
    assert time.perf_counter() - start < 10


def test_importing_this_floor_imports_nothing_heavy():
    code = "import mergetool.recipe, sys; print({'numpy', 'numba', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
