"""Gradients sample by sample are those that torch gives of the whole model at once, by names on disk."""

from __future__ import annotations

import pytest
import torch

from execute.forward.tiny import batches, opened, save
from mergetool.errors import PlanError
from mergetool.execute.forward.gradients import backward

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def gradients(folder, batch, labels="data", seed=0):
    """The sum over samples of every gradient, by name on disk."""
    found = {}

    def told(seen):
        found[seen.name] = found.get(seen.name, 0) + seen.gradient

    with opened(folder) as model:
        model.load(model.groups, gradients=True)
        assert backward(model, batch, told, labels, seed) == 2
        assert all(parameter.grad is None for parameter in model.module.parameters()), "gradients are let go"
    return found


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral", "mixtral_fused"])
def test_next_tokens_are_what_a_causal_model_is_trained_on(name, tmp_path):
    original = save(name, tmp_path)
    (batch,) = batches(name)[:1]
    for i, length in enumerate((5, 7)):
        ids = batch["input_ids"][i : i + 1, :length]
        (original(input_ids=ids, labels=ids).loss * (length - 1)).backward()
    found = gradients(tmp_path, batch)
    for parameter, value in original.named_parameters():
        if parameter in found:
            torch.testing.assert_close(found[parameter], value.grad, rtol=1e-3, atol=1e-4)
    if name == "mixtral":
        fused = dict(original.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"].grad
        torch.testing.assert_close(found[EXPERT], fused[2, 24:], rtol=1e-3, atol=1e-4)


def test_a_classifier_is_trained_on_its_labels(tmp_path):
    original = save("bert_classifier", tmp_path)
    batch = batches("bert_classifier")[0] | {"labels": torch.tensor([2, 0])}
    (original(**batch).loss * 2).backward()
    found = gradients(tmp_path, batch)
    for parameter, value in original.named_parameters():
        torch.testing.assert_close(found[parameter], value.grad, rtol=1e-3, atol=1e-4)


def test_sampled_labels_come_from_the_seed(tmp_path):
    save("llama", tmp_path)
    (batch,) = batches("llama")[:1]
    first, again, other = (gradients(tmp_path, batch, "sampled", seed) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_the_expected_gradient_of_sampled_labels_is_zero(tmp_path):
    save("bert_classifier", tmp_path)
    (batch,) = batches("bert_classifier")[:1]
    total, squares = 0, 0
    for seed in range(200):
        gradient = gradients_of_one(tmp_path, batch, seed)
        total, squares = total + gradient, squares + gradient.square()
    mean, deviation = total / 200, (squares / 200).sqrt()
    assert float((mean.abs() / (deviation / 200**0.5)).max()) < 5


_kept = {}


def gradients_of_one(folder, batch, seed):
    """The gradient of a classifier's bias, of a model that is opened once."""
    if folder not in _kept:
        with opened(folder) as model:
            model.load(model.groups, gradients=True)
            _kept[folder] = model
    found = []

    def told(seen):
        if seen.name == "classifier.bias":
            found.append(seen.gradient)

    backward(_kept[folder], {key: value[:1] for key, value in batch.items()}, told, "sampled", seed)
    return found[0]


def test_a_model_without_a_head_has_no_loss(tmp_path):
    save("bert", tmp_path)
    with opened(tmp_path) as model:
        model.load(model.groups, gradients=True)
        with pytest.raises(PlanError, match="BertModel predicts nothing"):
            backward(model, batches("bert")[0], print)


def test_labels_of_the_data_must_be_there(tmp_path):
    save("bert_classifier", tmp_path)
    with opened(tmp_path) as model:
        model.load(model.groups, gradients=True)
        with pytest.raises(PlanError, match="no labels"):
            backward(model, batches("bert")[0], print, "data")
