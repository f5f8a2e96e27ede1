"""What is corrected, known from headers: biases that are added, whose statistics are aimed at, and what is refused."""

from __future__ import annotations

import json

import pytest

from mergetool.errors import PlanError
from mergetool.plan import show
from mergetool.plan.correction import shares
from mergetool.plan.tasks import of_task, tasks
from plan.models import planned

HEAD = """\
merge_method: linear
models: [{model: a, data: one}, {model: b, data: two}]
parameters: {weight: 0.5}
calibration:
  data:
    one: {path: one.txt, samples: 10, max_length: 50}
    two: {path: two.txt, samples: 1, max_length: 7}
"""
REPAIR = "correct: {method: repair}\n"
TACT = "correct: {method: tact, scope: all}\n"


@pytest.fixture
def folder(tmp_path, checkpoint):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"some text of {name}")
    checkpoint("a", 1)
    checkpoint("b", 2)
    return tmp_path


def problems(folder, text):
    with pytest.raises(PlanError) as caught:
        planned(folder, text)
    return [(p.what, p.where.rpartition("/")[2], p.fix) for p in caught.value.problems]


def test_every_added_bias_stands_behind_its_weight_and_is_laid_out(folder):
    plain, plan = planned(folder, HEAD), planned(folder, HEAD + REPAIR)
    names = [job.name for job in plan.jobs]
    added = [job for job in plan.jobs if job.added]
    assert [name for name in names if name not in {job.name for job in added}] == [job.name for job in plain.jobs]
    assert all(names[names.index(job.name) - 1] == job.name.removesuffix("bias") + "weight" for job in added)
    assert [name for shard in plan.shards for name in shard.header.entries] == names
    assert plan.config == {"attention_bias": True, "mlp_bias": True}
    assert plain.config == {}


def test_files_beside_the_model_leave_its_jobs_alone(folder):
    plain, plan = planned(folder, HEAD), planned(folder, HEAD + TACT.replace("}", ", fold: side_file}"))
    assert plan.jobs == plain.jobs
    assert plan.config == {}
    assert len(plan.correction.jobs) > len(plan.jobs)
    assert tasks(plan) == (plan,)


def test_each_task_is_a_plan_of_its_own(folder):
    plan = planned(folder, HEAD + TACT, output=folder / "out")
    one, two = tasks(plan)
    assert (one.task, two.task) == ("one", "two")
    assert (one.output, two.output) == (folder / "out" / "one", folder / "out" / "two")
    assert len({plan.digest, one.digest, two.digest}) == 3
    assert one.jobs == two.jobs == plan.jobs
    assert [task.name for task in one.correction.tasks] == ["one"]
    assert tasks(one) == (one,)
    with pytest.raises(PlanError, match="makes no model of the task `three`"):
        of_task(plan, "three")


def test_the_stage_and_the_models_are_shown(folder):
    plan = planned(folder, HEAD + TACT, output=folder / "out")
    (stage,) = [stage for stage in plan.stages if stage.name == "correct"]
    assert stage.passes == 4  # o; gate and up; down; and once more
    assert stage.tokens == 6 * (10 * 50 + 7)
    assert stage.memory > 0
    table = show.table(plan)
    assert "up to 4 runs of each layer" in table
    assert "one, two" in table
    data = show.as_json(plan)
    assert data["tasks"] == ["one", "two"]
    assert {job["method"] for job in data["jobs"] if job["name"].endswith("bias")} == {"add"}
    name = next(job.name for job in plan.jobs if job.added)
    assert "add: zeros, and what a correction makes of them" in show.job(plan, name)
    assert "scaled and shifted along axis 0" in show.job(plan, name)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("1, 3", ((0, 0.25), (1, 0.75))),
        ("0, 2", ((0, 0.0), (1, 1.0))),
        ("-1, 3", ((0, 0.5), (1, 0.5))),
        ("0, 0", ((0, 0.5), (1, 0.5))),
    ],
)
def test_the_goal_is_shared_as_the_merge_is(folder, weights, expected):
    first, second = weights.split(", ")
    text = HEAD.replace("data: one}", f"data: one, parameters: {{weight: {first}}}}}")
    text = text.replace("data: two}", f"data: two, parameters: {{weight: {second}}}}}")
    text = text.replace("parameters: {weight: 0.5}", "parameters: {normalize: false}")
    plan = planned(folder, text + REPAIR)
    assert shares(plan.jobs[1]) == expected


def test_what_a_rule_keeps_aims_at_its_own_model(folder):
    rule = "rules: [{where: {part: mlp}, keep: b}]\n"
    plan = planned(folder, HEAD + rule + REPAIR)
    mlp = next(job for job in plan.jobs if job.part.role == "mlp.up" and not job.added)
    assert shares(mlp) == ((1, 1.0),)
    assert mlp.corrected == 0


def test_a_task_is_corrected_towards_its_own_model_on_its_own_data(folder):
    plan = planned(folder, HEAD + TACT.replace("}", ", data: two, samples: 1}"))
    (task,) = plan.correction.tasks
    assert (task.name, task.source, [data.samples for data in task.data]) == ("two", 1, [1])
    (both,) = planned(folder, HEAD + REPAIR).correction.tasks
    assert (both.name, both.source, [data.name for data in both.data]) == ("", None, ["one", "two"])


def test_a_shared_head_has_no_room_for_tasks(folder):
    text = HEAD + "correct: {method: tact, fold: head}\n"
    ((what, where, fix),) = problems(folder, text)
    assert "a head over the vocabulary is shared by all tasks" in what
    assert where == "merge.yaml:8:19"
    assert fix == "use `fold: per_task` or `fold: side_file`"


def test_what_a_rule_drops_cannot_be_run(folder):
    rule = 'rules: [{where: {name: "*.layers.1.mlp.*"}, drop: true}]\n'
    ((what, where, fix),) = problems(folder, HEAD + rule + REPAIR)
    assert what.startswith("`correct` runs the merged model, which lacks `model.layers.1.mlp.")
    assert where.startswith("merge.yaml:8:")
    assert "without `correct`" in fix


def test_a_model_of_unknown_names_is_refused(folder):
    import numpy as np
    from safetensors.numpy import save_file

    for label in ("a", "b"):
        save_file({"strange": np.ones((2, 2), np.float32)}, folder / label / "model.safetensors")
        (folder / label / "config.json").write_text(json.dumps({}))
    ((what, where, _),) = problems(folder, HEAD + REPAIR)
    assert "Nothing is corrected" in what
    assert where == "merge.yaml:8:19"
