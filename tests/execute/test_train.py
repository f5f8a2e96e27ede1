"""Training of coefficients: what comes of it, the traps of the published code, the folder, refusals."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.func import functional_call  # noqa: E402

from mergetool.errors import CheckpointError, NonFinite, PlanError  # noqa: E402
from mergetool.execute.train.loop import train  # noqa: E402
from mergetool.execute.train.product import read_coefficients, summary, write_coefficients  # noqa: E402
from mergetool.execute.train.settings import Settings  # noqa: E402
from mergetool.execute.train.state import begin  # noqa: E402
from mergetool.facts.dam import Slot, apply  # noqa: E402
from mergetool.facts.dam_losses import LOSSES, Target  # noqa: E402
from tests.execute.train_models import (  # noqa: E402
    QUICK,
    TIME,
    VOCABULARY,
    WIDTH,
    data,
    models,
    objective_of,
    one_thread,
    texts,
    values_of,
)

__all__ = ["one_thread"]  # a fixture


@pytest.mark.parametrize("form", ["full", "delta"])
def test_training_comes_nearer_to_the_teachers(form):
    given, settings = models(), replace(QUICK, form=form, steps=40)
    trained = train(given, data(), settings)
    looks = [each["kl"] for each in trained.curve["held_out"]]
    assert len(trained.curve["steps"]) == trained.steps
    assert min(looks) < 0.9 * looks[0]
    assert [len(each["each"]) for each in trained.curve["steps"]] == [2] * trained.steps


def test_the_merge_of_the_product_is_what_was_trained():
    given = models()
    trained = train(given, data(), replace(QUICK, held_out=0.0))
    made = trained.coefficients
    base, sources = given.base[1].tensors, [each.tensors for each in given.sources.values()]
    merged = {
        name: torch.from_numpy(apply(made.of(name), [s[name].numpy() for s in sources], base[name].numpy()))
        for name in made.weights
    }
    objective = objective_of(given, data(), QUICK)
    values = {each.key: torch.from_numpy(made.values[each.label]) for slot in given.slots for each in slot.sets}
    with torch.no_grad():
        weights = objective.student.weights(lambda name: objective.coefficients(values, name))
    assert all(torch.allclose(weights[name].double(), merged[name], atol=1e-6) for name in merged)
    assert all(value.dtype == np.float32 for value in made.values.values())


def test_what_is_not_trained_stays_the_average_and_is_merged_once():
    given = models(3, trainable=("linear",))
    trained = train(given, data(3), QUICK)
    for slot in given.slots:
        found = values_of(trained)[slot.name]
        assert np.all(found == np.float32(1 / 3)) != slot.trained
        assert (f"{slot.name}:rows" in values_of(trained)) == (slot.trained and len(slot.shape) > 1)


def test_biases_begin_at_one_nth_like_everything_else():
    given = models(3)
    objective = objective_of(given, data(3), replace(QUICK, form="full"))
    bias = next(slot for slot in given.slots if slot.name.endswith("up_proj.bias"))
    state = begin(given.slots, 3, objective.start, QUICK, "cpu")
    with torch.no_grad():
        weights = objective.student.weights(lambda name: objective.coefficients(state.values, name))
    average = sum(source.tensors[bias.name] for source in given.sources.values()) / 3
    assert bias.axes == ()
    assert torch.allclose(weights[bias.name], average)


def test_coefficients_are_float32_whatever_the_weights_are():
    given = models()
    for source in (*given.sources.values(), given.base[1]):
        source.tensors = {name: tensor.bfloat16() for name, tensor in source.tensors.items()}
    trained = train(given, data(), replace(QUICK, steps=1, learning_rate=1e-4, warmup=0.0, held_out=0.0))
    start = {name: 0.0 if name.endswith(":rows") else 0.5 for name in values_of(trained)}
    moved = {float(abs(x - start[name])) for name, c in values_of(trained).items() for x in c.ravel()}
    assert 0 < max(moved) < 2e-4  # the step of bfloat16 at a half is 2e-3


def test_coefficients_without_a_gradient_do_not_decay():
    state = begin([Slot("w", (4, 3), (1,), "w", True)], 2, 0.5, QUICK, "cpu")
    state.values["w"].grad = torch.zeros(2, 3)
    state.optimizer.step()
    assert torch.equal(state.values["w"], torch.full((2, 3), 0.5))


def test_rows_begin_at_zero_and_columns_at_one_nth():
    given = models(3)
    state = begin(given.slots, 3, 1 / 3, QUICK, "cpu")
    added = {key: value for key, value in state.values.items() if key.endswith(":rows")}
    assert len(added) == sum(slot.rows is not None for slot in given.slots) > 0
    for key, value in state.values.items():
        assert torch.equal(value, torch.full_like(value, 0.0 if key in added else 1 / 3))


def test_a_batch_of_rows_weighs_as_its_tokens_do_not_as_its_pads():
    given, settings = models(), replace(QUICK, batch_tokens=2 * 3 * TIME, held_out=0.0)
    ragged = [texts(seed, 6, (2, TIME, 4)) for seed in (1, 2)]
    objective = objective_of(given, ragged, settings)
    shapes = {each.key: each.coefficients(2) for slot in given.slots for each in slot.sets}
    values = {key: torch.full(shape, 0.4, requires_grad=True) for key, shape in shapes.items()}
    losses, _ = objective.gradients(values, 0)

    with torch.no_grad():
        merged = objective.student.weights(lambda name: objective.coefficients(values, name))
        for stream, source, loss in zip(objective.streams, given.sources.values(), losses):
            each = []
            for place in stream.step(0):
                ids = stream.rows[place]["input_ids"]
                teacher = functional_call(given.module, source.tensors, (ids,))[0]
                student = functional_call(given.module, merged, (ids,))[0]
                each += LOSSES["kl"](student, Target(teacher), settings.temperature).tolist()
            assert loss == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_the_folder_gives_back_what_was_trained(tmp_path):
    trained = train(models(), data(), QUICK)
    write_coefficients(tmp_path, trained, QUICK)
    found = read_coefficients(tmp_path)
    assert (found.form, found.granularity) == ("delta", "row+column")
    embedding = "model.embed_tokens.weight"
    assert [(values.shape, axes) for values, axes in found.of(embedding)] == [
        ((2, WIDTH), (1,)),
        ((2, VOCABULARY), (0,)),
    ]
    assert (found.sources, found.base) == (("source0", "source1"), "base")
    assert found.axes == trained.coefficients.axes
    assert all(np.array_equal(found.values[name], each) for name, each in values_of(trained).items())
    about = json.loads((tmp_path / "dam.json").read_text())
    assert about["curve"] == trained.curve
    assert about["summary"]["source0"]["min"] <= about["summary"]["source0"]["mean"]
    assert summary(found) == about["summary"]


def test_a_folder_of_columns_alone_is_read_as_well(tmp_path):
    columns = replace(QUICK, granularity="column")
    trained = train(models(granularity="column"), data(), columns)
    write_coefficients(tmp_path, trained, columns)
    about = json.loads((tmp_path / "dam.json").read_text())
    assert about["axes"]["model.embed_tokens.weight"] == [1]
    found = read_coefficients(tmp_path)
    assert found.weights == tuple(found.values)
    assert all(len(found.of(name)) == 1 for name in found.weights)


def test_a_folder_that_is_not_complete_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no trained coefficients"):
        read_coefficients(tmp_path)
    write_coefficients(tmp_path, train(models(), data(), QUICK), QUICK)
    about = json.loads((tmp_path / "dam.json").read_text())
    del about["axes"]["model.embed_tokens.weight"]
    (tmp_path / "dam.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="name different weights"):
        read_coefficients(tmp_path)


@pytest.mark.parametrize("loss", ["js", "mse", "entropy"])
def test_every_loss_and_penalty_trains(loss):
    more = {"similarity": 0.1, "overlap": 1e-3, "weighted_overlap": 1e-3, "l1": 1e-3, "l2": 1e-3}
    trained = train(models(3), data(3), replace(QUICK, loss=loss, sum_to_one=True, topk=5, **more))
    for name, c in values_of(trained).items():
        assert c.sum(0) == pytest.approx(0.0 if name.endswith(":rows") else 1.0, abs=1e-5)
    assert trained.curve["steps"][0]["penalty"] > 0


def test_what_cannot_be_trained_is_refused():
    given = models()
    with pytest.raises(PlanError, match="two models or more, not 1"):
        train(replace(given, sources={"one": given.base[1]}), data(1), QUICK)
    with pytest.raises(PlanError, match="calibration data for 3"):
        train(given, data(3), QUICK)
    with pytest.raises(PlanError, match="weighs what the sources changed"):
        train(replace(given, base=None), data(), QUICK)
    with pytest.raises(PlanError, match="none are left to train on"):
        train(given, [each[:1] for each in data()], QUICK)
    with pytest.raises(PlanError, match="none of the weights is trained"):
        train(models(trainable=()), data(), QUICK)


def test_numbers_that_are_not_finite_end_the_training():
    given = models()
    given.sources["source1"].tensors["model.embed_tokens.weight"][0, 0] = float("nan")
    with pytest.raises(NonFinite, match="lower the learning rate"):
        train(given, data(), QUICK)


def test_all_mistakes_in_the_settings_are_said_at_once():
    with pytest.raises(PlanError) as caught:
        Settings(loss="ce", form="both", trainable=("bias",), temperature=0.0, steps=0, held_out=1.0, clip=float("nan"))
    text = str(caught.value)
    for word in ("loss", "form", "trainable", "temperature", "steps", "held_out", "clip"):
        assert word in text
    with pytest.raises(PlanError, match="compares deltas"):
        Settings(form="full", weighted_overlap=1.0)


def test_the_rate_rises_and_falls():
    settings = Settings(steps=100, warmup=0.1, learning_rate=1.0, schedule="cosine")
    rates = [settings.rate(step) for step in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert replace(settings, schedule="linear").rate(55) == pytest.approx(0.5)
    assert replace(settings, schedule="constant", warmup=0.0).rate(0) == 1.0
