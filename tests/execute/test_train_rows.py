"""Calibration data as rows: padding, what counts, what a step takes."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")


from mergetool.execute.train.loop import train  # noqa: E402
from mergetool.execute.train.rows import join, responses, rows, streams  # noqa: E402
from tests.execute.train_models import (  # noqa: E402
    QUICK,
    TIME,
    Source,
    data,
    models,
    one_thread,
    same,
    values_of,
)

__all__ = ["one_thread"]  # a fixture


def test_batches_become_rows_and_rows_batches():
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 4)}
    (joined,) = join(rows([batch]))
    assert all(torch.equal(joined[name], batch[name]) for name in batch)


def test_texts_of_different_length_are_padded_and_others_keep_apart():
    texts = [{"input_ids": torch.ones(1, n).long(), "attention_mask": torch.ones(1, n).long()} for n in (2, 4)]
    (joined,) = join(texts)
    assert joined["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    images = [{"pixel_values": torch.zeros(1, 3, n, n)} for n in (2, 2, 4)]
    assert [len(each["pixel_values"]) for each in join(images)] == [2, 1]


def test_prompts_and_pads_are_left_out():
    ids = torch.arange(10).view(2, 5)
    labels = torch.tensor([[-100, -100, 2, 3, 4], [-100, -100, -100, 8, -100]])
    first, second = responses([{"input_ids": ids, "labels": labels}])
    assert first["counted"].tolist() == [[False, True, True, True, False]]
    assert second["counted"].tolist() == [[False, False, True, False, False]]


def test_only_counted_positions_matter():
    given = models()
    plain, settings = data(), replace(QUICK, held_out=0.0, steps=3)
    labels = torch.tensor([[-100, -100, -100, 1, 1, 1]])
    counted = [responses([{**row, "labels": labels} for row in each]) for each in plain]
    changed = [[{**row, "input_ids": row["input_ids"].clone()} for row in each] for each in counted]
    for each in changed:
        for row in each:
            row["input_ids"][0, -1] = 0  # no position that counts sees it
    first, second, third = (train(given, some, settings) for some in (counted, changed, plain))
    assert same(first, second)
    assert not same(first, third)


def test_an_epoch_goes_over_all_rows_and_never_over_those_held_out():
    (stream, _) = streams(data(), 0.2, 2 * 2 * TIME, 0)
    assert len(stream.held_out) == 2
    seen = [place for step in range(4) for place in stream.step(step)]
    assert sorted(seen) == list(stream.trained)
    assert set(stream.trained) | set(stream.held_out) == set(range(10))
    (other, _) = streams(data(), 0.2, 2 * 2 * TIME, 1)
    assert [other.step(step) for step in range(4)] != [stream.step(step) for step in range(4)]


def test_classifiers_have_one_position_a_row():
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.proj(x)

    given = models()
    linear = next(slot for slot in given.slots if slot.name.endswith("0.mlp.up_proj.weight"))
    weight = replace(linear, name="proj.weight", shape=(3, 4), key="w", rows=None)
    slots = [weight, replace(weight, name="proj.bias", shape=(3,), key="b", axes=())]
    torch.manual_seed(0)
    sources = {f"s{i}": Source({"proj.weight": torch.randn(3, 4), "proj.bias": torch.randn(3)}) for i in range(2)}
    made = replace(given, module=Classifier(), sources=sources, slots=slots, base=None)
    some = [[{"x": torch.randn(1, 4), "labels": torch.zeros(1)} for _ in range(8)] for _ in range(2)]
    trained = train(made, some, replace(QUICK, form="full", topk=2, batch_tokens=4))
    assert values_of(trained)["proj.weight"].shape == (2, 4)
    assert values_of(trained)["proj.bias"].shape == (2,)
