"""How often the sources are read is known from the plan."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mergetool.execute import batch
from mergetool.execute.run import run
from mergetool.plan import show, work
from mergetool.plan.work import WIDE
from plan.models import TIES, normal, planned, save, sparse

PASSES = {
    "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n": 1,
    "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1}\n": 1,
    "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 0.5}\n": 2,
    TIES: 3,
    TIES.replace("density: 0.5", "density: 1"): 1,
    TIES.replace("density: 0.5", "density: 0.5\n  scope: model"): 1,
    TIES.replace("ties", "dare_ties"): 1,
    TIES.replace("ties", "dare_ties") + "  rescale: l1\n": 2,
    TIES + 'rules: [{where: {name: "*"}, keep: a}]\n': 1,
}


def unheld(plan):
    """The plan if no tensor could be held."""
    return replace(plan, memory=replace(plan.memory, resident=0))


@pytest.mark.parametrize(("text", "passes"), PASSES.items())
def test_a_job_says_how_often_it_goes_over_its_sources(trio_folder, text, passes):
    plan = planned(trio_folder, text)
    assert {job.passes for job in plan.jobs} == {passes}
    ahead = 2 if "model\n" in text else 0
    assert {plan.passes(job) for job in plan.jobs} == {1 + ahead}
    assert {plan.passes(job) for job in unheld(plan).jobs} == {1 + ahead}
    assert {unheld(plan).passes(job) for job in plan.jobs} == {passes + ahead}
    assert unheld(plan).bytes_read == (passes + ahead) * sum(job.bytes_read for job in plan.jobs)


@pytest.mark.parametrize(("text", "passes"), PASSES.items())
def test_a_run_reads_no_more_than_the_plan_says(trio_folder, tmp_path, monkeypatch, text, passes):
    plan = unheld(planned(trio_folder, text))
    once = sum(job.bytes_read for job in plan.jobs)
    together = run(plan, tmp_path / "together").bytes_read
    assert once <= together <= plan.bytes_read
    if "model\n" not in text:  # a batch is read once, whatever the passes
        assert together == once
    monkeypatch.setattr(batch, "BATCH_BYTES", 1)
    read = run(plan, tmp_path / "merged").bytes_read
    assert once <= read <= plan.bytes_read
    if "density: 0.5" not in text or "dare" in text:
        assert read == plan.bytes_read == passes * once


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("wide", [0, 16])
def test_a_part_of_a_large_tensor_is_kept(tmp_path, monkeypatch, workers, wide):
    """Of four tiles each worker keeps one, which both may look at where they share the tensor."""
    monkeypatch.setattr(work, "WIDE", wide)
    tile = 1 << 18
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, {"w": ("BF16", normal((4 * tile,), "BF16", seed, 1))})
    plan = planned(tmp_path)
    once = 3 * 2 * 4 * tile
    read = {}
    for resident in (0, 3 * 2 * tile, once):
        memory = replace(plan.memory, tile=tile, resident=resident, workers=workers)
        read[resident] = run(replace(plan, memory=memory), tmp_path / f"merged {resident}").bytes_read
    assert once < read[3 * 2 * tile] < read[0] < 3.1 * once  # a sample besides three passes
    assert read[0] - read[3 * 2 * tile] >= 3 * 2 * tile
    assert read[once] - once < 3 * 2 * tile  # only the look at a sample is read again


def test_a_tensor_that_all_workers_share_may_be_read_for_every_pass(tmp_path):
    for name in ("base", "a", "b"):
        sparse(tmp_path / name, {"w": (1 << 23,), "v": (1 << 22,)}, "F8_E4M3")
    plan = planned(tmp_path, "out_dtype: bfloat16\n" + TIES, workers=2)
    plan = replace(plan, memory=replace(plan.memory, tile=1 << 18, resident=1 << 30))
    wide, narrow = plan.job("w"), plan.job("v")
    assert wide.size > WIDE * plan.memory.tile >= narrow.size
    assert (plan.passes(wide), plan.passes(narrow)) == (3, 1)
    alone = replace(plan, memory=replace(plan.memory, workers=1))
    assert alone.passes(wide) == 1


def test_what_is_shown_counts_every_pass(tmp_path):
    for name in ("base", "a", "b"):
        sparse(tmp_path / name, {"w": (40_000_000,), "v": (10,)})
    plan = planned(tmp_path)
    assert [(stage.name, stage.passes) for stage in plan.stages] == [("merge", 3)]
    text = show.table(plan)
    assert "read     up to 720 MB" in text
    assert "up to 3 passes" in text
    assert "up to 3 times" in show.job(plan, "w")
    data = json.loads(json.dumps(show.as_json(plan)))
    assert [job["passes"] for job in data["jobs"]] == [plan.passes(job) for job in plan.jobs] == [3, 1]
    assert data["totals"]["bytes_read"] == 3 * 3 * 80_000_000 + 3 * 20
    assert not data["totals"]["read_once"]


def test_what_is_read_once_is_said_without_a_bound(trio_plan):
    assert "up to" not in show.table(trio_plan).split("\nMemory\n")[0]
    assert trio_plan.read_once
