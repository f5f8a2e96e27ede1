"""A plan's digest stands for everything that decides the output, and for nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from mergetool.plan import build
from mergetool.recipe import load
from plan.models import TIES, llama, planned, save, trio

PRINT = """
import sys
from mergetool.plan import build
from mergetool.recipe import load
print(build(load(sys.argv[1])).digest)
"""


@pytest.fixture
def folder(tmp_path):
    return trio(tmp_path)


def test_the_digest_is_the_same_in_every_process(folder):
    here = planned(folder).digest
    for seed in ("0", "1", "4242"):
        command = [sys.executable, "-c", PRINT, str(folder / "merge.yaml")]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == here


def test_comments_the_output_and_resources_do_not_change_the_digest(folder):
    here = planned(folder).digest
    assert planned(folder, f"# a comment\n{TIES}output: elsewhere\n").digest == here
    assert planned(folder, memory=400 << 20, workers=1).digest == here
    assert planned(folder, output=folder / "merged").digest == here


@pytest.mark.parametrize(
    "change",
    [
        ("density: 0.5", "density: 0.25"),
        ("weight: 1", "weight: 2"),
        ("[0.25, 1]", "[0.25, 0.5]"),
        ("merge_method: ties", "merge_method: dare_ties"),
        ("merge_method: ties", "seed: 1\nmerge_method: ties"),
        ("merge_method: ties", "out_dtype: float32\nmerge_method: ties"),
        ("merge_method: ties", "tokenizer_source: a\nmerge_method: ties"),
        ("parameters:\n", "rules: [{where: {part: norm}, keep: a}]\nparameters:\n"),
        ("density: 0.5", "density: [{filter: mlp, value: 0.5}, {value: 0.5}]"),
    ],
    ids=lambda change: change[1].split("\n")[0],
)
def test_each_word_of_the_recipe_changes_the_digest(folder, change):
    old, new = change
    (folder / "a" / "tokenizer.json").write_text("{}")
    assert TIES.count(old) == 1
    assert planned(folder, TIES.replace(old, new)).digest != planned(folder).digest


def test_the_order_of_the_models_changes_the_digest(folder):
    text = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: %s}, {model: %s}]\n"
    assert planned(folder, text % ("a", "b")).digest != planned(folder, text % ("b", "a")).digest


def test_the_shard_size_changes_the_digest(folder):
    assert planned(folder, shard_size=1000).digest != planned(folder).digest


@pytest.mark.parametrize("name", ["base", "a", "b"])
def test_a_rewritten_source_changes_the_digest(folder, name):
    before = planned(folder).digest
    path = folder / name / "model.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert planned(folder).digest != before


def test_a_source_with_the_same_size_and_time_but_another_layout_changes_the_digest(folder):
    before = planned(folder).digest
    path = folder / "a" / "model.safetensors"
    stat = path.stat()
    swapped = {"0": "1", "1": "0"}
    tensors = llama(1).items()
    save(
        folder / "a", {re.sub(r"(?<=layers\.)\d", lambda found: swapped[found[0]], name): raw for name, raw in tensors}
    )
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert planned(folder).digest != before


def test_a_config_that_says_something_else_changes_the_digest(folder):
    before = planned(folder)
    path = folder / "base" / "config.json"
    stat = path.stat()
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 5}))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = planned(folder)
    assert after.digest != before.digest


def test_a_changed_file_that_the_output_carries_changes_the_digest(folder):
    (folder / "base" / "tokenizer_config.json").write_text("{}")
    before = planned(folder).digest
    (folder / "base" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert planned(folder).digest != before


def test_planning_twice_gives_the_same_plan(folder):
    planned(folder)
    recipe = load(folder / "merge.yaml")
    one, other = build(recipe), build(recipe)
    assert (one.digest, one.jobs, one.shards, one.routes, one.memory) == (
        other.digest,
        other.jobs,
        other.shards,
        other.routes,
        other.memory,
    )
