"""What is prepared is each source's own, right, found again, and told to jobs; and what is said where it cannot be."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from execute.conftest import contents  # noqa: E402
from execute.forward.tiny import opened  # noqa: E402
from execute.prepare_models import TRAIN, Told, about, asking, known, models, planned, tokenizer  # noqa: E402
from mergetool.errors import CheckpointError, NonFinite, PlanError  # noqa: E402
from mergetool.execute.calibration import open_tokenizer, read  # noqa: E402
from mergetool.execute.fact_folder import open_facts  # noqa: E402
from mergetool.execute.job import work  # noqa: E402
from mergetool.execute.parts import finish, run_part  # noqa: E402
from mergetool.execute.prepare import prepare  # noqa: E402
from mergetool.execute.record import record  # noqa: E402
from mergetool.execute.run import compute, run  # noqa: E402
from mergetool.methods import METHODS  # noqa: E402
from mergetool.plan.parts import Share  # noqa: E402
from mergetool.recipe.data import Train  # noqa: E402

__all__ = ["known"]  # a fixture

pytestmark = pytest.mark.usefixtures("known")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return models(tmp_path_factory.mktemp("prepare"))


@pytest.fixture
def folder(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "own")


def test_nothing_is_made_where_no_method_asks(shared, tmp_path):
    made = prepare(planned(shared, "linear"), root=tmp_path / "facts")
    assert (dict(made.turnings), made.notes, made.coefficients) == ({}, (), None)
    assert not (tmp_path / "facts").exists()


def test_every_source_has_the_gram_of_its_own_data(shared, tmp_path, monkeypatch):
    asking(monkeypatch, "linear", gram="gram")
    plan = planned(shared, "linear")
    made = prepare(plan, root=tmp_path / "facts")
    merged = [plan.sources[read.source].label for read in plan.job(DOWN).reads]
    for source, label in enumerate(merged):
        own = {"a": ("first",), "b": ("second",)}.get(label, ("first", "second"))
        data = [d for d in plan.recipe.calibration.data if d.name in own]
        samples = [read(d, open_tokenizer(shared / label, label), shared, plan.recipe.seed) for d in data]
        batches = [batch for each in samples for batch in each.batches()]
        with opened(shared / label) as model:
            expected = record(model, batches, ["gram"], made_of={"test": label}, root=tmp_path / "other")
        found = made.matrix(plan.job(DOWN), "gram", source)
        assert found.axis == 1
        assert found.values.dtype == np.float64
        np.testing.assert_array_equal(
            found.values, expected.get(DOWN, "gram").astype(float) / expected.get(DOWN, "count")
        )


def test_what_multiplies_nothing_has_no_gram(shared, tmp_path, monkeypatch):
    asking(monkeypatch, "linear", gram="gram")
    plan = planned(shared, "linear")
    made = prepare(plan, root=tmp_path)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert made.matrix(plan.job(name), "gram", 0) is None
    assert made.matrix(plan.job("lm_head.weight"), "gram", 0).values.shape == (16, 16)


def test_weights_that_are_stored_the_other_way_round_are_told_so(tmp_path, monkeypatch):
    folder = models(tmp_path / "m", "gpt2")
    asking(monkeypatch, "linear", gram="gram")
    plan = planned(folder, "linear")
    made = prepare(plan, root=tmp_path / "facts")
    for name in ("c_fc", "c_proj"):
        job = plan.job(f"transformer.h.0.mlp.{name}.weight")
        found = made.matrix(job, "gram", 0)
        assert (found.axis, len(found.values)) == (0, job.shape[0])
    square = plan.job("transformer.h.0.attn.c_proj.weight")
    assert made.matrix(square, "gram", 0).axis == 0


def test_experts_in_one_tensor_have_a_gram_each(tmp_path, monkeypatch):
    folder = models(tmp_path / "m", "mixtral_fused")
    asking(monkeypatch, "linear", gram="gram")
    plan = planned(folder, "linear")
    made = prepare(plan, root=tmp_path / "facts")
    for name, axis in (("gate_up_proj", 2), ("down_proj", 2)):
        job = plan.job(f"model.layers.0.mlp.experts.{name}")
        found = made.matrix(job, "gram", 0)
        assert (found.axis, found.values.shape) == (axis, (4, job.shape[2], job.shape[2]))


def test_only_what_jobs_ask_for_is_measured(shared, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    rule = "rules: [{where: {name: '*mlp*'}, merge_method: task_arithmetic}]\n"
    plan = planned(shared, "linear", rule)
    made = prepare(plan, root=tmp_path)
    assert {plan.sources[source].label for _, source in made.measured} == {"a", "b"}
    for facts in made.measured.values():
        assert facts.names
        assert all(".mlp." in name for name in facts.names)


def test_a_second_call_measures_nothing(shared, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram", importance="squared_gradients")
    plan, told = planned(shared, "task_arithmetic"), Told()
    first = prepare(plan, root=tmp_path, progress=told)
    assert sorted(told.labels) == ["measure a", "measure a", "measure b", "measure b"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = prepare(planned(shared, "task_arithmetic"), root=tmp_path, progress=told)
    assert len(told.labels) == 4
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {key: f.path for key, f in first.measured.items()} == {key: f.path for key, f in second.measured.items()}


def test_other_data_are_measured_anew_and_only_they(folder, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    first, told = prepare(planned(folder, "task_arithmetic"), root=tmp_path / "facts"), Told()
    (folder / "second.txt").write_text((folder / "second.txt").read_text().replace("w5", "w6"))
    second = prepare(planned(folder, "task_arithmetic"), root=tmp_path / "facts", progress=told)
    assert told.labels == ["measure b"]
    same = {
        plan_place: first.measured[plan_place].path == second.measured[plan_place].path for plan_place in first.measured
    }
    assert sorted(same.values()) == [False, True]


def test_squared_gradients_are_one_for_every_weight(shared, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", importance="squared_gradients")
    plan = planned(shared, "task_arithmetic")
    made = prepare(plan, root=tmp_path)
    for job in plan.jobs:
        for source in range(2):
            found = made.extra(job, "importance", source)
            assert found.values.shape == job.shape
            assert found.axes == tuple(range(len(job.shape)))
            assert (np.asarray(found.values) >= 0).all()
    first, second = (made.extra(plan.job(DOWN), "importance", source).values for source in range(2))
    assert not np.array_equal(first, second)


def test_coefficients_are_trained_once_and_told_by_their_axes(shared, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", coefficient="coefficients")
    plan, told = planned(shared, "task_arithmetic", TRAIN), Told()
    made = prepare(plan, root=tmp_path, progress=told)
    assert told.labels == ["train"]
    found = [made.extra(plan.job(DOWN), "coefficient", source) for source in range(2)]
    assert [(each.values.shape, each.axes) for each in found] == [((24,), (1,))] * 2
    assert [(each.added.values.shape, each.added.axes) for each in found] == [((16,), (0,))] * 2
    assert not np.array_equal(found[0].values, found[1].values)
    assert np.any(found[0].values != 0.5)
    assert np.any(found[0].added.values != 0.0)
    again = prepare(plan, root=tmp_path, progress=told)
    assert told.labels == ["train"]
    np.testing.assert_array_equal(again.extra(plan.job(DOWN), "coefficient", 1).values, found[1].values)
    (path,) = tmp_path.glob("coefficients-*")
    kept = open_facts(path)
    assert kept.fields(DOWN) == ("coefficients", "row_coefficients")
    np.testing.assert_array_equal(kept.get(DOWN, "row_coefficients")[1], found[1].added.values)
    assert "model.norm.weight" in kept.names
    assert kept.fields("model.norm.weight") == ("coefficients",)
    assert about(path)["made_of"]["settings"]["steps"] == 4
    assert json.loads((path / "dam.json").read_text())["sources"] == ["a", "b"]


def test_what_other_methods_make_is_not_trained_and_a_note_says_so(shared, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", coefficient="coefficients")
    rule = "rules: [{where: {part: embedding}, keep: base}]\n"
    plan = planned(shared, "task_arithmetic", TRAIN + rule)
    made = prepare(plan, root=tmp_path)
    assert np.all(made.coefficients.values["model.embed_tokens.weight"] == 0.5)
    assert any("model.embed_tokens.weight" in note for note in made.notes)


def test_turned_sources_are_measured_turned(shared, tmp_path, monkeypatch):
    folder = shutil.copytree(shared, tmp_path / "own")
    path = folder / "a" / "model.safetensors"
    order = torch.arange(23, -1, -1)
    tensors = load_file(path)
    axes = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
    for name in [name for name in tensors if name.split(".")[-2] in axes]:
        tensors[name] = tensors[name].index_select(axes[name.split(".")[-2]], order).contiguous()
    save_file(tensors, path, {"format": "pt"})
    asking(monkeypatch, "task_arithmetic", gram="gram")
    expected = prepare(planned(shared, "task_arithmetic"), root=tmp_path / "1")
    align = "align: {method: weight_matching, groups: [mlp]}\n"
    plan = planned(folder, "task_arithmetic", align)
    made = prepare(plan, root=tmp_path / "2")
    assert set(made.turnings) == {[source.label for source in plan.sources].index("a")}
    for source in range(2):
        found, wanted = (each.matrix(plan.job(DOWN), "gram", source).values for each in (made, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * wanted.max())
    assert made.notes


def test_an_adapter_runs_only_if_it_is_trusted(folder, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    (folder / "adapter.py").write_text("def network(config): ...\ndef read(path, samples, seed): ...\n")
    plan = planned(folder, "task_arithmetic", "  adapter: adapter.py\n")
    with pytest.raises(PlanError, match="trust-code"):
        prepare(plan, root=tmp_path / "facts")


def test_data_that_are_too_short_are_refused(folder, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    (folder / "first.txt").write_text("w3 w4")
    with pytest.raises(PlanError, match="first"):
        prepare(planned(folder, "task_arithmetic"), root=tmp_path / "facts")


def test_a_source_without_a_tokenizer_is_read_with_that_of_the_output_and_without_any_refused(
    folder, tmp_path, monkeypatch
):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    for path in (folder / "a").glob("*token*"):
        path.unlink()
    prepare(planned(folder, "task_arithmetic"), root=tmp_path / "facts")
    for path in folder.glob("*/*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer that can be loaded"):
        prepare(planned(folder, "task_arithmetic"), root=tmp_path / "facts")
    tokenizer(folder / "base")


def test_an_unknown_architecture_is_refused(folder, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    for label in ("base", "a", "b"):
        path = folder / label / "config.json"
        path.write_text(path.read_text().replace('"llama"', '"strange"').replace("LlamaForCausalLM", "Strange"))
    with pytest.raises(CheckpointError, match="adapter"):
        prepare(planned(folder, "task_arithmetic"), root=tmp_path / "facts")


def test_a_nan_is_refused_and_nothing_is_kept(folder, tmp_path, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    path = folder / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors[DOWN][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFinite):
        prepare(planned(folder, "task_arithmetic"), root=tmp_path / "facts")
    assert not list((tmp_path / "facts").glob("gram-*"))


def test_parameters_that_differ_cannot_be_trained_together(shared, tmp_path, monkeypatch):
    from mergetool.execute.prepare_models import Sources
    from mergetool.execute.prepare_training import settings_of

    plan = planned(shared, "task_arithmetic")
    jobs = list(plan.jobs)
    for i, job in enumerate(jobs):
        object.__setattr__(job, "parameters", {"granularity": "row" if i else "column", "trainable": "linear"})
    with pytest.raises(PlanError, match="granularity"):
        settings_of(Sources(plan), jobs)
    found = settings_of(Sources(plan), jobs[:1])
    assert (found.granularity, found.trainable, found.learning_rate) == ("column", ("linear",), Train().learning_rate)
    object.__setattr__(jobs[0], "parameters", {"trainable": "linear+norm", "whole": True})
    found = settings_of(Sources(plan), jobs[:1])
    assert (found.form, found.trainable) == ("full", ("linear", "norm"))


# Runs


ALIGN = "align: {method: activation_matching, groups: [mlp]}\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "facts"


def test_a_run_in_parts_makes_what_a_run_of_the_whole_makes(shared, tmp_path, cache):
    plan = planned(shared, "task_arithmetic", ALIGN)
    whole = run(plan, tmp_path / "whole")
    assert sorted(path.name.split("-")[0] for path in cache.iterdir()) == 2 * ["alignment"] + 3 * ["cka"]
    shutil.rmtree(cache)
    told = [Told(), Told()]
    for number in (1, 2):
        run_part(plan, Share(number, 2), tmp_path / "parts", progress=told[number - 1])
    assert not cache.exists()
    assert [any("measure" in label or "match" in label for label in each.labels) for each in told] == [True, False]
    parts = finish(plan, tmp_path / "parts")
    assert whole.digests == parts.digests
    assert whole.notes == parts.notes
    assert any("faces the reference already" in note for note in whole.notes)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_jobs_are_told_what_was_prepared(shared, tmp_path, cache, monkeypatch):
    asking(monkeypatch, "task_arithmetic", gram="gram")
    seen = []

    def watched(*arguments, known=None):
        seen.append((known or arguments[7]).matrix(arguments[1], "gram", 0))
        asking(monkeypatch, "task_arithmetic")  # what the kernels make of it is tested with the methods
        try:
            return work(*arguments[:7])
        finally:
            asking(monkeypatch, "task_arithmetic", gram="gram")

    monkeypatch.setattr("mergetool.execute.engine.work", watched)
    plan = planned(shared, "task_arithmetic", workers=1)
    run(plan, tmp_path / "merged")
    assert len(seen) == len(plan.jobs)
    assert any(each is None for each in seen)
    assert any(each is not None for each in seen)


def test_one_tensor_of_aligned_models_is_computed_in_memory(shared, tmp_path, cache):
    plan = planned(shared, "task_arithmetic", ALIGN)
    run(plan, tmp_path / "whole")
    (path,) = (tmp_path / "whole").glob("*.safetensors")
    np.testing.assert_array_equal(compute(plan, plan.job(DOWN)), load_file(path)[DOWN].numpy().reshape(-1))


def test_the_command_runs_an_adapter_only_if_it_is_told_to(folder, tmp_path, cache):
    from click.testing import CliRunner

    from mergetool.cli.group import mergetool

    (folder / "adapter.py").write_text("raise ValueError('it was run')\n")
    planned(folder, "task_arithmetic", "  adapter: adapter.py\n" + ALIGN)
    for flag, said in (((), "--trust-code"), (("--trust-code",), "it was run")):
        arguments = ["run", str(folder / "merge.yaml"), str(tmp_path / "merged"), "--quiet", *flag]
        result = CliRunner().invoke(mergetool, arguments, prog_name="mergetool")
        assert result.exit_code == 3
        assert said in result.output


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral_fused"])
@pytest.mark.parametrize("method", ["regmean", "fisher", "dam"])
def test_methods_that_ask_for_facts_merge_in_one_run_as_in_parts(method, name, tmp_path, cache):
    if method not in METHODS:
        pytest.skip(f"there is no method {method}")
    folder = models(tmp_path / "m", name)
    more = TRAIN if method == "dam" else ""
    plan = planned(folder, method, more, ("parameters: {weight: 0.5}\n", "") if more else ())
    whole = run(plan, tmp_path / "whole")
    for number in (1, 2):
        run_part(plan, Share(number, 2), tmp_path / "parts")
    assert finish(plan, tmp_path / "parts").digests == whole.digests
    (path,) = (tmp_path / "whole").glob("*.safetensors")
    made, first, second = (load_file(each) for each in (path, *(folder / m / "model.safetensors" for m in "ab")))
    moved = [key for key in made if not torch.allclose(made[key], (first[key] + second[key]) / 2, atol=1e-4)]
    assert len(moved) > 9
    assert all(each.isfinite().all() for each in made.values())
