"""The same recipe and sources give the same bytes however the work is divided."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import oracles
import pytest
from backends import DEVICES
from plan.models import normal, planned, save

from execute.conftest import contents, tensors
from mergetool.execute import batch, engine, run
from mergetool.plan import work
from mergetool.plan.memory import LARGEST_TILE, SMALLEST_TILE
from mergetool.storage.digest import tensor_digest
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.header import read_header
from mergetool.storage.reader import Reader
from mergetool.storage.shards import shard

BIG, SMALL = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
HEAD = "base_model: base\nmodels: [{model: a}, {model: b}]\nparameters: "
RECIPES = {
    "ties": f"merge_method: ties\n{HEAD}{{weight: [1, 0.5], density: 0.3}}\n",
    "whole model": f"merge_method: ties\n{HEAD}{{weight: 1, density: 0.3, scope: model}}\n",
    "dare": f"merge_method: dare_ties\n{HEAD}{{weight: 1, density: 0.3, rescale: l1}}\n",
    "linear": "merge_method: linear\nmodels: [{model: base}, {model: a}, {model: b}]\nparameters: {weight: 1}\n",
    "slerp": "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 0.4}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with a tensor of a little more than two of the smallest tiles, and smaller ones around it."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        held = {
            "model.embed_tokens.weight": ("BF16", normal((96, 64), "BF16", seed, 1)),
            BIG: ("BF16", normal((2 * SMALLEST_TILE + 4097,), "BF16", seed, 2)),
            SMALL: ("BF16", normal((640,), "BF16", seed, 3)),
            "model.layers.1.flags": ("BOOL", np.arange(SMALLEST_TILE + 5).astype(np.uint8) % 2),
            "model.layers.1.steps": ("I64", np.arange(SMALLEST_TILE + 5)),
            "model.norm.weight": ("BF16", normal((64,), "BF16", seed, 4)),
        }
        save(folder / name, held, limit=1 << 20 if name == "a" else 1 << 30)
    return folder


def divided(plan, workers, tile, resident):
    return replace(plan, memory=replace(plan.memory, workers=workers, tile=tile, resident=resident))


@pytest.mark.parametrize("recipe", RECIPES)
def test_workers_tiles_and_ways_through_a_tensor_do_not_show(folder, tmp_path, monkeypatch, recipe):
    plan = planned(folder, RECIPES[recipe])
    one = divided(plan, 1, LARGEST_TILE, 1 << 30)
    run(one, tmp_path / "merged")
    expected = contents(tmp_path / "merged")
    ways = product((1, 2, 5), (SMALLEST_TILE, 3 * SMALLEST_TILE), (0, 7 * SMALLEST_TILE, 1 << 30), (0, 1, 16))
    for number, (workers, tile, resident, wide) in enumerate(ways):
        monkeypatch.setattr(work, "WIDE", wide)
        output = tmp_path / f"merged{number}"
        run(divided(plan, workers, tile, resident), output)
        assert contents(output) == expected, (workers, tile, resident, wide)


def test_a_tensor_of_several_tiles_is_the_oracles(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "WIDE", 1)
    text = f"out_dtype: float64\n{RECIPES['ties'].replace('[1, 0.5]', '1')}"
    run(divided(planned(folder, text), 2, SMALLEST_TILE, 0), tmp_path / "merged")
    base, a, b = (oracles.widen_bfloat16(tensors(folder / name)[BIG][1]) for name in ("base", "a", "b"))
    found = tensors(tmp_path / "merged")[BIG][1]
    np.testing.assert_array_equal(found, oracles.ties(base, [a, b], 1, 0.3))


def test_a_whole_model_of_several_tiles_is_the_oracles(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "WIDE", 1)
    text = f"out_dtype: float64\n{RECIPES['whole model']}"
    run(divided(planned(folder, text), 2, SMALLEST_TILE, 0), tmp_path / "merged")
    models = [
        {n: oracles.widen_bfloat16(raw) for n, (dtype, raw) in tensors(folder / name).items() if dtype == "BF16"}
        for name in ("base", "a", "b")
    ]
    merged = oracles.ties_model(models[0], models[1:], 1, 0.3)
    for name, (dtype, found) in tensors(tmp_path / "merged").items():
        if dtype == "F64":
            np.testing.assert_array_equal(found, merged[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gpus_code_gives_the_bytes_of_the_compiled_code(folder, tmp_path, recipe, device):
    plan = planned(folder, RECIPES[recipe])
    run(plan, tmp_path / "merged")
    run(plan, tmp_path / "other", device=device)
    assert contents(tmp_path / "other") == contents(tmp_path / "merged")


@pytest.mark.parametrize("recipe", ["ties", "whole model"])
def test_shards_only_divide_the_tensors(folder, tmp_path, recipe):
    run(planned(folder, RECIPES[recipe]), tmp_path / "merged")
    expected = tensors(tmp_path / "merged")
    plan = planned(folder, RECIPES[recipe], shard_size=1_000_000)
    run(plan, tmp_path / "shards")
    assert len(plan.shards) == len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    found = tensors(tmp_path / "shards")
    assert found.keys() == expected.keys()
    for name, (dtype, values) in found.items():
        assert dtype == expected[name][0]
        np.testing.assert_array_equal(values, expected[name][1])


@pytest.mark.parametrize("tile", [SMALLEST_TILE, 3 * SMALLEST_TILE, LARGEST_TILE])
def test_the_digests_of_a_report_are_those_of_the_file(folder, tmp_path, tile):
    report = run(divided(planned(folder, RECIPES["ties"]), 2, tile, 0), tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    with Reader(path) as reader:
        found = {name: tensor_digest(reader, entry) for name, entry in read_header(path).entries.items()}
    assert found == report.digests


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_the_digest_of_numbers_narrower_than_a_byte_does_not_depend_on_tiles(tmp_path, dtype):
    bits = 4 if dtype == "F4" else 6
    shape = (3 * SMALLEST_TILE + 8,)
    raw = np.random.default_rng(0).integers(0, 256, shape[0] * bits // 8).astype(np.uint8)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        parts = [("packed", DTYPES[dtype], shape), ("w", DTYPES["F32"], (4,))]
        (part,) = shard(parts, 1 << 40)
        (tmp_path / name / part.file).write_bytes(part.preamble + raw.tobytes() + bytes(16))
        (tmp_path / name / "config.json").write_text("{}")
    plan = planned(tmp_path, RECIPES["ties"])
    for tile in (SMALLEST_TILE, 3 * SMALLEST_TILE, LARGEST_TILE):
        output = tmp_path / f"merged{tile}"
        report = run(divided(plan, 2, tile, 0), output)
        path = output / "model.safetensors"
        entry = read_header(path).entries["packed"]
        assert path.read_bytes()[entry.start : entry.stop] == raw.tobytes()
        with Reader(path) as reader:
            assert tensor_digest(reader, entry) == report.digests["packed"]


MERGE = """
import sys
from pathlib import Path
import mergetool
mergetool.run(mergetool.build(mergetool.load(Path(sys.argv[1]))), sys.argv[2])
"""


@pytest.mark.parametrize("seed", ["1", "31337"])
def test_another_process_with_another_hash_seed_gives_the_same_bytes(folder, tmp_path, seed):
    run(planned(folder, RECIPES["dare"]), tmp_path / "merged")
    command = [sys.executable, "-c", MERGE, str(folder / "merge.yaml"), str(tmp_path / "other")]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    assert contents(tmp_path / "other") == contents(tmp_path / "merged")


def test_sources_larger_than_the_page_cache_are_let_go_of_behind_the_merge(folder, tmp_path, monkeypatch):
    """Large tensors of all sources, once each is merged, and nothing is fetched ahead; of models that fit it is."""
    plan = planned(folder, RECIPES["ties"])
    forgotten, fetched = [], []
    monkeypatch.setattr(Reader, "forget", lambda reader, *place: forgotten.append(place))
    monkeypatch.setattr(Reader, "advise", lambda reader, *place: fetched.append(place))
    monkeypatch.setattr(batch, "BATCH_BYTES", 100_000)
    run(plan, tmp_path / "fits")
    assert not forgotten
    read = sorted((read.tensor.start, read.tensor.nbytes) for job in plan.jobs for read in (*job.reads, *job.compare))
    assert sum(length for _, length in fetched) == sum(nbytes for _, nbytes in read)  # each byte once
    assert all(any(at <= start and start + size <= at + length for at, length in fetched) for start, size in read)
    fetched.clear()
    monkeypatch.setattr(engine, "machine_memory", lambda: 1 << 20)
    run(plan, tmp_path / "does not")
    large = [read.tensor for job in plan.jobs for read in job.reads if read.tensor.nbytes >= 100_000]
    assert len(large) == 3 + 2
    assert sorted(forgotten) == sorted((tensor.start, tensor.nbytes) for tensor in large)
    assert not fetched
    assert contents(tmp_path / "fits") == contents(tmp_path / "does not")


def test_pages_that_are_let_go_of_can_be_read_again(folder):
    path = next((folder / "base").glob("*.safetensors"))
    with Reader(path) as reader:
        entry = next(iter(read_header(path).entries.values()))
        before = reader.read(entry)
        reader.forget(entry.start, entry.size * entry.dtype.bits // 8)
        np.testing.assert_array_equal(reader.read(entry), before)
