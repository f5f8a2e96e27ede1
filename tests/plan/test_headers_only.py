"""Planning reads headers and configs, loads nothing heavy, and is the same work for any size of model."""

from __future__ import annotations

import subprocess
import sys

import pytest
from bench.checkpoints import SIZES
from bench.checkpoints import shapes as large_shapes

from mergetool.storage import system
from mergetool.storage.header import read_header
from plan.models import TIES, planned, sparse

PLAN = """
import sys
import mergetool
plan = mergetool.build(mergetool.load(sys.argv[1]))
assert plan.jobs
heavy = {"torch", "transformers", "numba", "huggingface_hub", "safetensors"} & set(sys.modules)
print(",".join(sorted(heavy)))
"""


def test_planning_imports_neither_torch_nor_transformers(trio_folder, tmp_path):
    (trio_folder / "merge.yaml").write_text(TIES)
    command = [sys.executable, "-c", PLAN, str(trio_folder / "merge.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.fixture
def guarded(monkeypatch):
    """Reads behind a header are refused; the bytes read are counted."""
    true = system.preadv
    counted = {"bytes": 0}

    def preadv(fd, view, offset):
        length = bytearray(8)
        true(fd, memoryview(length), 0)
        data = 8 + int.from_bytes(length, "little")
        assert offset + len(view) <= data, "a weight was read"
        counted["bytes"] += len(view)
        return true(fd, view, offset)

    monkeypatch.setattr(system, "preadv", preadv)
    return counted


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Three models of the shape of a 1.1 B llama, their data holes in the files."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("base", "a", "b"):
        sparse(folder / name, dict(large_shapes(SIZES["1.1b"])))
    return folder


def test_nothing_is_read_but_headers(large, guarded):
    plan = planned(large)
    assert len(plan.jobs) == 22 * 9 + 3
    assert sum(job.size for job in plan.jobs) == 1_100_048_384
    headers = sum(read_header(large / name / "model.safetensors").data_start for name in ("base", "a", "b"))
    assert 0 < guarded["bytes"] <= 2 * headers


def test_the_guard_sees_weights_being_read(large, guarded):
    from mergetool.storage.reader import Reader

    header = read_header(large / "a" / "model.safetensors")
    with Reader(large / "a" / "model.safetensors") as reader, pytest.raises(AssertionError, match="weight"):
        reader.read(header.entries["model.norm.weight"])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_every_job_shard_and_route_is_known_without_weights(large, guarded, scope):
    plan = planned(large, f"{TIES}  scope: {scope}\n", shard_size=500_000_000)
    assert len(plan.routes) == 3 * len(plan.jobs)
    assert sum(len(shard.header.entries) for shard in plan.shards) == len(plan.jobs)
    assert all(sum(e.nbytes for e in shard.header.entries.values()) <= 500_000_000 for shard in plan.shards)
    again = [job for job in plan.jobs if not plan.memory.holds(job)]
    assert {job.size for job in again} == {32000 * 2048, 5632 * 2048}
    twice_more = plan.jobs if scope == "model" else again
    assert plan.bytes_read == 3 * 2 * (1_100_048_384 + 2 * sum(job.size for job in twice_more))
