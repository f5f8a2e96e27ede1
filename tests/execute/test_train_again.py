"""When training stops, and that a killed training goes on to the same coefficients."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")


from mergetool.execute.train import teachers  # noqa: E402
from mergetool.execute.train.loop import forget, train  # noqa: E402
from mergetool.execute.train.state import STATE  # noqa: E402
from tests.execute.train_models import (  # noqa: E402
    QUICK,
    TIME,
    data,
    models,
    one_thread,
    same,
    texts,
)

__all__ = ["one_thread"]  # a fixture


def test_training_stops_when_the_held_out_data_say_so_and_the_best_is_kept():
    settings = replace(QUICK, steps=500, learning_rate=0.3, schedule="constant", every=5, patience=3)
    trained = train(models(), data(), settings)
    looks = trained.curve["held_out"]
    best = min(looks, key=lambda each: each["kl"])
    assert trained.steps < 500
    assert trained.best_step == best["step"] == looks[-4]["step"]
    patient = train(models(), data(), replace(settings, patience=1000, steps=trained.steps + 5))
    assert patient.steps == trained.steps + 5


def test_the_best_coefficients_are_those_of_the_best_step():
    settings = replace(QUICK, steps=80, learning_rate=0.1, schedule="constant", warmup=0.0, every=5, patience=3)
    trained = train(models(), data(), settings)
    assert 0 < trained.best_step < trained.steps
    again = train(models(), data(), replace(settings, steps=trained.best_step))
    assert same(trained, again)


def test_without_held_out_data_the_last_coefficients_are_taken():
    trained = train(models(), data(), replace(QUICK, held_out=0.0))
    assert trained.curve["held_out"] == []
    assert trained.best_step == trained.steps == QUICK.steps


@pytest.mark.parametrize("topk", [0, 5])
def test_the_same_seed_gives_the_same_coefficients(topk):
    settings = replace(QUICK, topk=topk)
    first, second = train(models(), data(), settings), train(models(), data(), settings)
    assert same(first, second)
    assert not same(first, train(models(), data(), replace(settings, seed=1)))


class Killed(Exception):
    pass


def kill_at(step):
    def progress(record):
        if record["step"] == step:
            raise Killed

    return progress


@pytest.mark.parametrize("topk", [0, 5])
@pytest.mark.parametrize("step", [1, 7, 11])
@pytest.mark.parametrize("granularity", ["row+column", "column"])
def test_a_killed_training_goes_on_and_gives_the_same_coefficients(tmp_path, topk, step, granularity):
    settings = replace(QUICK, topk=topk, save_every=4, granularity=granularity)
    own = {"granularity": granularity}
    whole = train(models(**own), data(), replace(settings, save_every=0))
    with pytest.raises(Killed):
        train(models(**own), data(), settings, folder=tmp_path, progress=kill_at(step))
    seen = []
    again = train(models(**own), data(), settings, folder=tmp_path, progress=lambda record: seen.append(record["step"]))
    assert seen[0] == step - step % 4 + 1
    assert same(whole, again)
    assert again.curve == whole.curve
    assert train(models(**own), data(), settings, folder=tmp_path, progress=kill_at(1)).steps == again.steps


def test_another_training_does_not_go_on_from_this_one(tmp_path):
    train(models(), data(), QUICK, folder=tmp_path)
    seen = []
    train(models(), data(), replace(QUICK, learning_rate=1e-3), folder=tmp_path, progress=seen.append)
    assert seen[0]["step"] == 1


def test_a_damaged_state_is_as_good_as_none(tmp_path):
    whole = train(models(), data(), QUICK, folder=tmp_path)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:100])
    assert same(whole, train(models(), data(), QUICK, folder=tmp_path))


def test_teachers_predict_once_and_other_data_are_not_taken_for_the_same(tmp_path):
    settings = replace(QUICK, topk=5, steps=1, held_out=0.0)
    given = models()
    train(given, data(), settings, folder=tmp_path)
    first, kept = [each.reads for each in given.sources.values()], sorted(tmp_path.glob("teacher-*"))
    assert len(kept) == 2
    again = models()
    train(again, data(), replace(settings, learning_rate=1e-3), folder=tmp_path)
    assert all(later.reads < before for later, before in zip(again.sources.values(), first))
    train(again, [*data()[:1], data()[0]], settings, folder=tmp_path)
    assert len(sorted(tmp_path.glob("teacher-*"))) == 3
    forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_teachers_that_were_killed_go_on_with_the_same_bits(tmp_path, monkeypatch):

    settings = replace(QUICK, topk=5, held_out=0.0)
    some = [texts(seed, 21, (TIME, 2, 4)) for seed in (1, 2)]
    whole = train(models(), some, settings)
    monkeypatch.setattr(teachers, "_FILE", 1)
    monkeypatch.setattr(teachers.Kept, "_keep", interrupted(teachers.Kept._keep))
    with pytest.raises(Killed):
        train(models(), some, settings, folder=tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("teacher-0-*"))) == 1
    assert same(whole, train(models(), some, settings, folder=tmp_path))


def interrupted(keep):
    calls = []

    def once(self, waiting):
        if calls:
            raise Killed
        calls.append(1)
        keep(self, waiting)

    return once
