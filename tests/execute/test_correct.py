"""A corrected merge, run by transformers from the folder that was written, has the moments it should have."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from execute.correct_models import (  # noqa: E402
    RECIPE,
    REPAIR,
    TACT,
    batches,
    facts,
    kept,
    llamas,
    loaded,
    made,
    moments,
    planned,
    spread_of,
    tensors,
)
from mergetool.errors import NonFinite  # noqa: E402
from mergetool.execute import correct_steps  # noqa: E402
from mergetool.execute.fact_folder import open_facts  # noqa: E402
from mergetool.execute.fact_making import Making  # noqa: E402
from mergetool.execute.forward.passes import CannotStream  # noqa: E402
from mergetool.execute.merged import merged_weights  # noqa: E402
from mergetool.execute.parts import finish, run_part  # noqa: E402
from mergetool.execute.prepare import prepare  # noqa: E402
from mergetool.execute.prepared import Prepared  # noqa: E402
from mergetool.execute.run import run  # noqa: E402
from mergetool.execute.verify import verify  # noqa: E402
from mergetool.facts.correction import Edit, goal  # noqa: E402
from mergetool.plan import build, show  # noqa: E402
from mergetool.plan.parts import Share  # noqa: E402
from mergetool.recipe import load  # noqa: E402

__all__ = ["facts", "llamas"]  # fixtures

DOWN = "model.layers.0.mlp.down_proj"


def modules(plan):
    return [output.weight.removesuffix(".weight") for output in plan.correction.outputs.outputs]


def expected_std(target, merged, samples, clamp=10.0):
    """What is left to be right: with few samples factors are drawn to 1."""
    epsilon = target.std.mean() / (2 * samples)
    return merged * np.clip((target.std + epsilon) / (merged + epsilon), 1 / clamp, clamp)


# -------------------------------------------------------------------------------------------------------------- REPAIR


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_every_output_of_a_repaired_model_has_the_mean_and_spread_of_the_goal(name, tmp_path, facts):
    folder = made(tmp_path / "models", name)
    plan = planned(folder)
    run(plan, tmp_path / "out")
    merged, sources = loaded(tmp_path / "out"), [loaded(folder / label) for label in ("a", "b")]
    found = open_facts(kept(facts)[0])

    assert len(modules(plan)) == {"llama": 12, "gpt2": 9, "mistral": 12}[name]
    for path in modules(plan):
        target = goal([moments(each, path, batches(plan)) for each in sources])
        has = moments(merged, path, batches(plan))
        before = found.get(f"{path}.weight", "merged.std")
        np.testing.assert_allclose(has.std, expected_std(target, before, 12), rtol=2e-4)
        np.testing.assert_allclose(has.std, target.std, rtol=0.1)
        if name != "mistral":  # which has no place for shifts
            np.testing.assert_allclose(has.mean, target.mean, atol=1e-4 * float(target.std.max()))


def test_what_was_measured_is_what_is_written(llamas, tmp_path, facts):
    """In bfloat16 too: later outputs are measured behind weights that are rounded as they are stored."""
    plan = planned(llamas, change=("float32", "bfloat16"))
    run(plan, tmp_path / "out")
    merged, found = loaded(tmp_path / "out"), open_facts(kept(facts)[0])
    for path in modules(plan):
        has = moments(merged, path, batches(plan))
        np.testing.assert_allclose(has.std, found.get(f"{path}.weight", "corrected.std"), rtol=1e-4)
        np.testing.assert_allclose(has.mean, found.get(f"{path}.weight", "corrected.mean"), atol=1e-5)


def test_a_llama_gets_biases_and_its_config_says_so(llamas, tmp_path, facts, monkeypatch):
    plan = planned(llamas)
    report = run(plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    has = tensors(tmp_path / "out")
    assert has[f"{DOWN}.bias"].any()
    assert not has["model.layers.0.self_attn.q_proj.bias"].any()  # which comes along with o's
    assert "REPAIR" in (tmp_path / "out" / "README.md").read_text()
    assert any("of the spread they should have" in note for note in report.notes)
    asked = []
    monkeypatch.setattr(
        sys.modules[run.__module__], "prepare", lambda plan, **how: asked.append(plan) or prepare(plan, **how)
    )
    found = verify(tmp_path / "out", sample=40)
    assert found.ok, found
    assert len(asked) == 1, "what the tensors need to know is made once for all of them"
    assert not any(check.skipped for check in found.checks)


def test_the_goal_follows_the_weights_of_the_merge(llamas, tmp_path, facts):
    more = REPAIR
    plan = planned(llamas, more, ("{model: b, data: second}", "{model: b, data: second, parameters: {weight: 1.5}}"))
    run(plan, tmp_path / "out")
    sources, merged = [loaded(llamas / label) for label in ("a", "b")], loaded(tmp_path / "out")
    target = goal([moments(each, DOWN, batches(plan)) for each in sources], [0.25, 0.75])
    np.testing.assert_allclose(moments(merged, DOWN, batches(plan)).mean, target.mean, atol=1e-5)


def test_the_ratios_before_and_after_are_kept_as_data(llamas, tmp_path, facts):
    run(planned(llamas), tmp_path / "out")
    found = spread_of(kept(facts)[0])
    assert [set(each) for each in found] == [{"output", "layer", "role", "task", "before", "after"}] * 12
    assert {each["task"] for each in found} == {None}
    assert [each["layer"] for each in found] == [layer for layer in range(3) for _ in range(4)]
    assert max(abs(each["after"] - 1) for each in found) < 0.05
    assert np.mean([abs(each["before"] - 1) for each in found]) > np.mean([abs(each["after"] - 1) for each in found])


def test_a_network_that_cannot_be_streamed_is_corrected_as_a_whole(llamas, tmp_path, facts, monkeypatch):
    run(planned(llamas), tmp_path / "streamed")

    def refuse(*args, **how):
        raise CannotStream("cannot be streamed")
        yield

    monkeypatch.setattr(correct_steps, "streamed", refuse)
    monkeypatch.setattr("mergetool.execute.fact_making.cache_folder", lambda kind: tmp_path / "other")
    run(planned(llamas), tmp_path / "whole")
    one, other = tensors(tmp_path / "streamed"), tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kill", [0, 1, 3, 4, 6, 9])
def test_a_killed_correction_is_gone_on_with_and_gives_the_same_bytes(
    llamas, tmp_path, facts, monkeypatch, kill, streaming
):
    if not streaming:
        monkeypatch.setattr(correct_steps.Sequential, "_blocks", lambda self: (_ for _ in ()).throw(CannotStream("x")))
    plan = planned(llamas)
    run(plan, tmp_path / "once")

    add, done = Making.add, []

    def killed(self, step, *args):
        if self.kind == "correction":
            if len(done) == kill:
                raise KeyboardInterrupt
            done.append(step)
        add(self, step, *args)

    monkeypatch.setattr("mergetool.execute.fact_making.cache_folder", lambda kind: tmp_path / "other")
    monkeypatch.setattr(Making, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "again")
    monkeypatch.setattr(Making, "add", add)
    measured = []
    original = correct_steps.Sequential._correct
    monkeypatch.setattr(
        correct_steps.Sequential,
        "_correct",
        lambda self, key, *rest: (measured.append(key), original(self, key, *rest)),
    )
    run(plan, tmp_path / "again")

    assert not set(done) & set(measured)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_workers_parts_and_tiles_give_the_same_bytes(llamas, tmp_path, facts, monkeypatch):
    run(planned(llamas, workers=1), tmp_path / "one")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()}
    plan = planned(llamas, workers=3)
    for part in (2, 1):
        run_part(plan, Share(part, 2), tmp_path / "parts")
    finish(plan, tmp_path / "parts")
    monkeypatch.setattr("mergetool.execute.fact_making.cache_folder", lambda kind: tmp_path / "other")
    run(planned(llamas, workers=2), tmp_path / "anew")
    for other in ("parts", "anew"):
        assert {p.name: p.read_bytes() for p in (tmp_path / other).iterdir() if p.is_file()} == expected


# ------------------------------------------------------------------------------------------------------------ settings


def test_the_spread_alone_needs_no_bias(llamas, tmp_path, facts):
    plan = planned(llamas, "correct: {method: repair, statistic: std}\n")
    assert not any(job.added for job in plan.jobs)
    run(plan, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("mlp_bias") is not True
    sources, merged = [loaded(llamas / label) for label in ("a", "b")], loaded(tmp_path / "out")
    target = goal([moments(each, DOWN, batches(plan)) for each in sources])
    np.testing.assert_allclose(moments(merged, DOWN, batches(plan)).std, target.std, rtol=0.1)


def test_no_factor_is_beyond_the_clamp(llamas, tmp_path, facts):
    report = run(planned(llamas, "correct: {method: repair, clamp: 1.02}\n"), tmp_path / "out")
    found = open_facts(kept(facts)[0])
    scales = np.concatenate([found.get(n, "scale") for n in found.names if "scale" in found.fields(n)])
    assert scales.max() == 1.02
    assert scales.min() == 1 / 1.02
    assert any("would need a factor beyond `clamp`, 1.02" in note for note in report.notes)


def test_few_samples_are_taken_of_each_data(llamas, tmp_path, facts):
    plan = planned(llamas, "correct: {method: repair, samples: 2}\n")
    assert [data.samples for data in plan.correction.tasks[0].data] == [2, 2]
    assert [data.samples for data in plan.recipe.calibration.data] == [6, 6]
    run(plan, tmp_path / "out")
    assert open_facts(kept(facts, "moments")[0]).get(f"{DOWN}.weight", "count") == 4 * 8


def test_dead_units_stay_as_they_are(tmp_path, facts):
    folder = made(tmp_path / "models")
    for label in ("a", "b"):
        file = folder / label / "model.safetensors"
        changed = load_file(file)
        changed["model.layers.1.mlp.up_proj.weight"][3] = 0
        save_file(changed, file, {"format": "pt"})
    run(planned(folder), tmp_path / "out")
    has = tensors(tmp_path / "out")
    assert all(bool(tensor.isfinite().all()) for tensor in has.values())
    assert not has["model.layers.1.mlp.up_proj.weight"][3].any()
    assert open_facts(kept(facts)[0]).get("model.layers.1.mlp.up_proj.weight", "scale")[3] == 1.0


def test_activations_that_are_not_finite_are_refused_and_nothing_is_kept(tmp_path, facts):
    folder = made(tmp_path / "models")
    for label in ("a", "b"):
        file = folder / label / "model.safetensors"
        changed = load_file(file)
        for name in ("gate", "up"):
            changed[f"model.layers.1.mlp.{name}_proj.weight"][:] = 1e25
        save_file(changed, file, {"format": "pt"})
    with pytest.raises(NonFinite, match=r"layers\.1"):
        run(planned(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [path for path in facts.iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_what_a_model_cannot_hold_is_said_in_the_plan_and_on_the_card(name, tmp_path, facts):
    folder = made(tmp_path / "models", name)
    plan = planned(folder)
    said = {"mistral": "the scale is corrected and the mean is not", "mixtral": "Routed experts"}[name]
    assert any(said in note for note in plan.notes)
    assert said in show.table(plan)
    run(plan, tmp_path / "out")
    assert said in (tmp_path / "out" / "README.md").read_text()
    loaded(tmp_path / "out")


@pytest.mark.parametrize(
    "method",
    [
        "merge_method: regmean\nbase_model: base",
        "merge_method: ties\nbase_model: base",
        "merge_method: slerp\nbase_model: a",
        "merge_method: dam\nbase_model: base\ntrain: {steps: 2, batch_tokens: 32, topk: 0, held_out: 0}",
    ],
)
def test_whatever_the_method_its_result_is_corrected(llamas, tmp_path, facts, method):
    change = ("merge_method: linear", method)
    plan = planned(llamas, REPAIR, change) if "slerp" not in method else _slerp(llamas)
    run(plan, tmp_path / "out")
    merged, found = loaded(tmp_path / "out"), open_facts(kept(facts)[0])
    for path in modules(plan):
        np.testing.assert_allclose(
            moments(merged, path, batches(plan)).std, found.get(f"{path}.weight", "corrected.std"), rtol=1e-4
        )
    if "slerp" in method:
        sources = [loaded(llamas / label) for label in ("a", "b")]
        target = goal([moments(each, DOWN, batches(plan)) for each in sources], [0.7, 0.3])
        np.testing.assert_allclose(moments(merged, DOWN, batches(plan)).mean, target.mean, atol=1e-5)
    assert verify(tmp_path / "out", sample=10).ok


def _slerp(folder):
    text = RECIPE.replace("merge_method: linear", "merge_method: slerp\nbase_model: a").replace("weight: 0.5", "t: 0.3")
    (folder / "slerp.yaml").write_text(text.replace("  - {model: a, data: first}\n", "") + REPAIR)
    return build(load(folder / "slerp.yaml"))


# ---------------------------------------------------------------------------------------------------------------- TACT


def test_every_task_gets_a_model_that_is_right_for_its_data(llamas, tmp_path, facts):
    plan = planned(llamas, TACT)
    report = run(plan, tmp_path / "out")
    assert [each.output for each in report.tasks] == [tmp_path / "out" / "first", tmp_path / "out" / "second"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first", "second"]
    for task, label in (("first", "a"), ("second", "b")):
        merged, expert = loaded(tmp_path / "out" / task), loaded(llamas / label)
        for path in modules(plan):
            target, has = (moments(each, path, batches(plan, task)) for each in (expert, merged))
            np.testing.assert_allclose(has.mean, target.mean, atol=1e-4 * float(target.std.max()))
            np.testing.assert_allclose(has.std, target.std, rtol=0.15)
        assert verify(tmp_path / "out" / task, sample=20).ok
        assert f"the task `{task}`" in (tmp_path / "out" / task / "README.md").read_text()
    assert run(plan, tmp_path / "out").unchanged


def test_the_models_of_tasks_are_made_in_parts_too(llamas, tmp_path, facts):
    plan = planned(llamas, TACT)
    run(plan, tmp_path / "whole")
    for part in (1, 2):
        report = run_part(plan, Share(part, 2), tmp_path / "parts")
    assert not report.missing
    assert finish(plan, tmp_path / "parts").digests == run(plan, tmp_path / "whole").digests
    for task in ("first", "second"):
        one, other = (tmp_path / each / task / "model.safetensors" for each in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()


def test_the_published_scope_corrects_the_last_norm(llamas, tmp_path, facts):
    plan = planned(llamas, "correct: {method: tact, data: first}\n")
    assert [output.weight for output in plan.correction.outputs.outputs] == ["model.norm.weight"]
    run(plan, tmp_path / "out")
    merged, expert = loaded(tmp_path / "out" / "first"), loaded(llamas / "a")
    target, has = (moments(each, "model.norm", batches(plan, "first")) for each in (expert, merged))
    np.testing.assert_allclose(has.std, target.std, rtol=0.1)


def test_a_soup_aims_at_its_members(llamas, tmp_path, facts):
    plan = planned(llamas, REPAIR + "evaluate: {data: first}\n", ("merge_method: linear", "merge_method: greedy_soup"))
    report = run(plan, tmp_path / "out")
    members = [label for label in ("a", "b") if f"the soup is {label} alone" in " ".join(report.notes)] or ["a", "b"]
    sources, has = [loaded(llamas / label) for label in members], loaded(tmp_path / "out")
    target = goal([moments(each, DOWN, batches(plan)) for each in sources])
    np.testing.assert_allclose(moments(has, DOWN, batches(plan)).mean, target.mean, atol=1e-5)


def test_grams_in_sequence_are_those_of_the_merge_as_it_is(llamas, tmp_path, facts):
    change = ("merge_method: linear", "merge_method: regmean")
    own = planned(llamas, "", (*change,)).recipe.folder / "correct.yaml"
    text = own.read_text().replace("{weight: 0.5}", "{weight: 0.5, sequential: true}")
    for name, more in (("plain", ""), ("repaired", REPAIR)):
        (llamas / f"{name}.yaml").write_text(text + more)
        run(build(load(llamas / f"{name}.yaml")), tmp_path / name)
    assert len(kept(facts, "gram-sequential")) == 1
    loaded(tmp_path / "repaired")


def test_edits_are_the_same_on_every_device(llamas):
    """The kernels of torch leave float64 as those of the CPU do."""
    plan = planned(llamas, change=("float32", "bfloat16"))
    random = np.random.default_rng(0)
    edits = {
        job.name: Edit(job.corrected, *random.normal(1, 0.1, (2, job.shape[job.corrected])))
        for job in plan.jobs
        if job.corrected is not None
    }
    made = []
    for device in ("cpu", "torch:cpu"):
        with merged_weights(plan, Prepared(plan, edits=edits), device) as weights:
            made.append({job.name: weights.raw(job) for job in plan.jobs})
    assert all(np.array_equal(raw, made[1][name]) for name, raw in made[0].items())
