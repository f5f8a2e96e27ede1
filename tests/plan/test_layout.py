"""What the plan says about the output is what the writer writes; sizes are plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from mergetool.storage.header import read_header
from mergetool.storage.writer import Writer
from plan.models import TIES, planned, save, shapes

MODEL_SCOPE = TIES + "  scope: model\n"


@pytest.mark.parametrize("limit", [1, 500, 1000, 5_000_000_000])
def test_a_shard_on_disk_has_the_offsets_of_the_plan(trio_folder, tmp_path, limit):
    plan = planned(trio_folder, shard_size=limit)
    names = []
    for shard in plan.shards:
        with Writer(tmp_path / shard.file, shard):
            pass
        assert read_header(tmp_path / shard.file) == shard.header
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes
        names += shard.header.entries
        data = sum(entry.nbytes for entry in shard.header.entries.values())
        assert data <= limit or len(shard.header.entries) == 1
    assert names == [job.name for job in plan.jobs]


def test_the_output_keeps_the_bases_names_order_shapes_and_dtypes(trio_folder):
    plan = planned(trio_folder)
    base = plan.sources[plan.lender].checkpoint.tensors.values()
    assert [(job.name, job.shape, job.dtype) for job in plan.jobs] == [(t.name, t.shape, t.dtype) for t in base]


@pytest.mark.parametrize(("asked", "stored"), [("dtype", "F16"), ("out_dtype", "F16")])
def test_a_dtype_that_is_asked_for_is_every_tensors(trio_folder, asked, stored):
    plan = planned(trio_folder, f"{asked}: float16\n{TIES}")
    assert {job.dtype.name for job in plan.jobs} == {stored}


def test_bytes_read_and_written_are_sums_over_the_tensors(trio_folder):
    plan = planned(trio_folder, shard_size=1000)
    weights = sum(_size(shape) for shape in shapes().values())
    assert plan.bytes_read == 3 * 2 * weights
    assert plan.bytes_written == 2 * weights + sum(len(shard.preamble) for shard in plan.shards)
    assert len(plan.shards) > 1


def test_a_measure_of_the_whole_model_reads_the_sources_twice_more(trio_folder):
    plan = planned(trio_folder, MODEL_SCOPE)
    weights = sum(_size(shape) for shape in shapes().values())
    assert [(stage.name, stage.passes) for stage in plan.stages] == [("measure", 2), ("merge", 1)]
    assert plan.stages[0].jobs == plan.stages[1].jobs == tuple(range(len(plan.jobs)))
    assert plan.bytes_read == (2 + 1) * 3 * 2 * weights


def test_a_measure_looks_only_at_the_tensors_that_are_trimmed(trio_folder):
    text = MODEL_SCOPE + "rules: [{where: {part: norm}, keep: a}, {where: {part: head}, parameters: {scope: tensor}}]\n"
    plan = planned(trio_folder, text)
    looked = {plan.jobs[i].name for i in plan.stages[0].jobs}
    assert looked == {name for name in shapes() if "norm" not in name and "head" not in name}
    measured = 3 * 2 * sum(_size(shapes()[name]) for name in looked)
    assert plan.bytes_read == 2 * measured + sum(job.bytes_read for job in plan.jobs)


def test_a_copy_counts_what_it_compares(tmp_path):
    for name in ("base", "a", "b"):
        save(tmp_path / name, {"w": ("F32", np.zeros(5, np.float32)), "steps": ("I64", np.arange(7))})
    plan = planned(tmp_path)
    assert plan.job("steps").bytes_read == 3 * 7 * 8
    assert plan.job("steps").bytes_written == 7 * 8
    assert plan.bytes_read == 3 * 7 * 8 + 3 * 5 * 4


def _size(shape):
    size = 1
    for axis in shape:
        size *= axis
    return size
