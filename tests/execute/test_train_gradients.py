"""The gradient of a training step through a whole model, and where its parameters come from."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch.func import functional_call  # noqa: E402

from mergetool.errors import CheckpointError  # noqa: E402
from mergetool.execute.train.loop import train  # noqa: E402
from mergetool.execute.train.student import Place, Places, Student, hollow, same_names  # noqa: E402
from mergetool.facts.dam_losses import LOSSES, Target  # noqa: E402
from mergetool.facts.dam_merge import Reads  # noqa: E402
from tests.execute.train_models import (  # noqa: E402
    QUICK,
    Source,
    Toy,
    data,
    models,
    objective_of,
    one_thread,
    same,
)

__all__ = ["one_thread"]  # a fixture


def naive(given, objective, values, step):
    """The loss of a step with every source in memory, stacked, and its gradient by plain autograd."""
    settings, sources = objective.settings, list(given.sources.values())
    built = {}
    for slot in given.slots:
        stack = torch.stack([each.tensors[slot.name] for each in sources]).to(given.dtype)
        start = given.base[1].tensors[slot.name].to(given.dtype) if settings.form == "delta" else 0.0
        sets = zip(slot.sets, objective.coefficients(values, slot.name), strict=True)
        factors = sum(c.to(given.dtype).reshape(each.over_weight(len(sources))) for each, c in sets)
        built[slot.name] = start + ((stack - start) * factors).sum(0)
    total = 0.0
    for stream, source in zip(objective.streams, sources):
        batch = torch.cat([stream.rows[place]["input_ids"] for place in stream.step(step)])
        own = {name: tensor.to(given.dtype) for name, tensor in source.tensors.items()}
        with torch.no_grad():
            teacher = functional_call(given.module, own, (batch,)).flatten(0, 1)
        student = functional_call(given.module, built, (batch,)).flatten(0, 1)
        total = total + LOSSES[settings.loss](student, Target(teacher), settings.temperature).mean()
    total.backward()
    return total


@pytest.mark.parametrize("form", ["full", "delta"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("granularity", ["row+column", "column", "row", "tensor", "layer"])
@pytest.mark.parametrize("trainable", [("linear",), ("embedding", "norm"), ("linear", "embedding", "norm")])
def test_the_gradient_of_a_step_is_that_of_plain_autograd(form, count, granularity, trainable):
    given = models(count, granularity, trainable, torch.float64)
    settings = replace(QUICK, form=form, granularity=granularity, trainable=trainable, similarity=0.0)
    objective = objective_of(given, data(count), settings)
    sets = [each for slot in given.slots for each in slot.sets]
    shapes = {each.key: each.coefficients(count) for each in sets if each.trained}
    torch.manual_seed(0)
    values = {key: torch.rand(shape, dtype=torch.float64, requires_grad=True) for key, shape in shapes.items()}

    losses, extra = objective.gradients(values, 3)
    found = {key: value.grad for key, value in values.items()}
    for value in values.values():
        value.grad = None
    total = naive(given, objective, values, 3)

    assert extra == 0.0
    # Teachers are kept in float32.
    assert sum(losses) == pytest.approx(float(total.detach()), rel=1e-5)
    for key, value in values.items():
        assert torch.allclose(found[key], value.grad, rtol=1e-4, atol=1e-7)


def test_tied_embeddings_have_one_set_of_coefficients():
    given = models()
    found = same_names(given.module, [slot.name for slot in given.slots])
    assert [place.names[0] for place in found.places] == [slot.name for slot in given.slots]
    assert found.ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_tied_weight_may_be_stored_under_its_other_name():
    module = Toy()
    names = ["lm_head.weight", *(name for name, _ in module.named_parameters() if "embed" not in name)]
    assert same_names(module, names).places[0] == Place(("model.embed_tokens.weight",), ("lm_head.weight",))
    with pytest.raises(CheckpointError, match="no weight of that name"):
        same_names(module, names[1:])


def test_parameters_are_built_of_several_weights_on_disk():
    class Stacked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))

        def forward(self, x):
            return torch.einsum("eoi,bi->bo", self.experts, x)

    given = models()
    slot = next(slot for slot in given.slots if slot.name.endswith("0.mlp.up_proj.weight"))
    slots = [replace(slot, name=f"expert{e}", key=f"expert{e}", shape=(3, 4), rows=None) for e in range(2)]
    torch.manual_seed(0)
    sources = [Source({s.name: torch.randn(3, 4, dtype=torch.float64) for s in slots}) for _ in range(2)]
    reads = {s.name: Reads(s, sources, None, "cpu", torch.float64) for s in slots}
    place = Place(("experts",), ("expert0", "expert1"), lambda tensors: [torch.stack(list(tensors))])
    student = Student(Stacked(), Places((place,)), reads)
    values = {s.name: torch.rand(2, 4, dtype=torch.float64, requires_grad=True) for s in slots}
    x = torch.randn(5, 4, dtype=torch.float64)
    student.logits(student.weights(lambda name: [values[name]]), {"x": x}).sin().sum().backward()
    found = {name: value.grad.clone() for name, value in values.items()}

    for value in values.values():
        value.grad = None
    plain = torch.stack([sum(s.tensors[n] * values[n][i] for i, s in enumerate(sources)) for n in values])
    torch.einsum("eoi,bi->bo", plain, x).sin().sum().backward()
    for name, value in values.items():
        assert torch.allclose(found[name], value.grad)


def test_a_hollow_module_runs_with_weights_from_outside():
    given = models()
    bare = replace(given, module=hollow(Toy()))
    assert all(parameter.is_meta for parameter in bare.module.parameters())
    assert same(train(given, data(), QUICK), train(bare, data(), QUICK))
