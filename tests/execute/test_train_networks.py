"""Training through networks of transformers, whose parameters are not always the tensors on disk."""

import json
from types import MappingProxyType

import pytest

torch = pytest.importorskip("torch")

from mergetool.anatomy import anatomy  # noqa: E402
from mergetool.execute.forward.model import open_model  # noqa: E402
from mergetool.execute.prepare_models import transposed  # noqa: E402
from mergetool.execute.train.student import Student, places_of  # noqa: E402
from mergetool.facts.dam import slots  # noqa: E402
from mergetool.facts.dam_merge import Reads  # noqa: E402
from tests.execute.forward.tiny import batches, save  # noqa: E402


class Held:
    """Weights in memory."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.shapes = MappingProxyType({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    def get(self, name):
        return self.tensors[name].clone()


def sources_around(base):
    torch.manual_seed(0)
    noise = [{name: 0.3 * tensor.std() * torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(2)]
    return [Held({name: base[name] + each[name] for name in base}) for each in noise]


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral", "mixtral_fused"])
@pytest.mark.parametrize("granularity", ["row+column", "column"])
def test_the_gradient_through_a_network_agrees_with_differences(name, granularity, tmp_path):
    from safetensors.torch import load_file

    save(name, folder := tmp_path)
    config = json.loads((folder / "config.json").read_text())
    base = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    base = {name: tensor for name, tensor in base.items() if tensor.ndim}
    model = open_model(config, Held(base), "base")
    shapes = model.weights.shapes
    drawn = slots(anatomy(config, shapes).parts, shapes, granularity=granularity, transposed=transposed(model))
    sources = sources_around(base)
    reads = {slot.name: Reads(slot, sources, model.weights, "cpu", torch.float64) for slot in drawn}
    student = Student(model.module, places_of(model), reads)
    used = {each for place in student.places.places for each in place.names}
    sets = {slot.name: slot.sets for slot in drawn}
    values = {
        each.label: torch.full(each.coefficients(2), 0.1 if each.added else 0.5, dtype=torch.float64)
        for every in sets.values()
        for each in every
    }
    batch = {key: value for key, value in batches(name, padded=False)[0].items() if key != "labels"}
    along = {s.label: torch.randn_like(values[s.label]) for name in sets if name in used for s in sets[name]}

    def loss(step, gradient=False):
        moved = {each: values[each] + step * along[each] for each in along}
        for value in moved.values():
            value.requires_grad_(gradient)
        weights = student.weights(lambda name: [moved[each.label] for each in sets[name]])
        return student.logits(weights, batch).double().log_softmax(-1)[..., 0].mean(), moved

    made, moved = loss(0.0, gradient=True)
    made.backward()
    slope = sum(float((value.grad * along[each]).sum()) for each, value in moved.items())
    with torch.no_grad():
        difference = float(loss(1e-4)[0] - loss(-1e-4)[0]) / 2e-4
    assert all(value.grad is not None for value in moved.values())
    assert slope == pytest.approx(difference, rel=2e-3)  # norms and rotary embeddings run in float32
