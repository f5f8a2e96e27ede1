"""The merged weight and its gradient against plain autograd that keeps everything."""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mergetool.anatomy import Part  # noqa: E402
from mergetool.errors import ShapeMismatch  # noqa: E402
from mergetool.facts.dam import apply, slots  # noqa: E402
from mergetool.facts.dam_merge import Reads, merged  # noqa: E402

CASES = [
    ("attention.q", (6, 4)),
    ("attention.q", (6,)),
    ("embedding", (9, 4)),
    ("embedding.patch", (6, 3, 2, 2)),
    ("norm", (4,)),
    ("expert.gate_up", (3, 6, 4)),
    ("scale", ()),
]


@dataclass
class Source:
    tensor: torch.Tensor
    reads: int = 0

    def get(self, name):
        self.reads += 1
        return self.tensor


def made(role, shape, granularity, count, form, dtype=torch.float64):
    (slot,) = slots({"w": Part(role, "", None, 0, 0.0, None, None, False)}, {"w": shape}, granularity=granularity)
    torch.manual_seed(count)
    sources = [Source(torch.randn(shape, dtype=dtype)) for _ in range(count)]
    base = Source(torch.randn(shape, dtype=dtype)) if form == "delta" else None
    shapes = [each.coefficients(count) for each in slot.sets]
    coefficients = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return slot, sources, base, coefficients


@pytest.mark.parametrize("form", ["full", "delta"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("granularity", ["row+column", "column", "row", "tensor", "layer"])
@pytest.mark.parametrize(("role", "shape"), CASES)
def test_weight_and_gradient_are_those_of_plain_autograd(role, shape, granularity, count, form):
    slot, sources, base, coefficients = made(role, shape, granularity, count, form)
    weight = merged(coefficients, Reads(slot, sources, base, dtype=torch.float64))
    outer = torch.randn(shape, dtype=torch.float64)
    (weight.sin() * outer).sum().backward()
    found = [each.grad for each in coefficients]
    for each in coefficients:
        each.grad = None

    stack = torch.stack([each.tensor for each in sources])
    start = torch.zeros(shape, dtype=torch.float64) if base is None else base.tensor
    factors = sum(c.reshape(each.over_weight(count)) for each, c in zip(slot.sets, coefficients, strict=True))
    plain = start + ((stack - start) * factors).sum(0)
    (plain.sin() * outer).sum().backward()

    assert torch.allclose(weight, plain, rtol=1e-13, atol=1e-13)
    for gradient, each in zip(found, coefficients, strict=True):
        assert torch.allclose(gradient, each.grad, rtol=1e-12, atol=1e-12)
    arrays = [each.tensor.numpy() for each in sources]
    sets = [(c.detach().numpy(), each.axes) for each, c in zip(slot.sets, coefficients, strict=True)]
    oracle = apply(sets, arrays, base and base.tensor.numpy())
    assert np.allclose(weight.detach().numpy(), oracle, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", ["full", "delta"])
@pytest.mark.parametrize("granularity", ["row+column", "column"])
def test_the_gradient_agrees_with_finite_differences(form, granularity):
    slot, sources, base, coefficients = made("mlp.up", (5, 3), granularity, 2, form)
    reads = Reads(slot, sources, base, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *c: merged(c, reads).sin(), coefficients)


@pytest.mark.parametrize("granularity", ["row+column", "column"])
def test_sources_are_read_once_a_pass_and_not_at_all_without_a_gradient(granularity):
    slot, sources, base, coefficients = made("mlp.up", (5, 3), granularity, 3, "delta")
    weight = merged(coefficients, Reads(slot, sources, base, dtype=torch.float64))
    assert [each.reads for each in sources] == [1, 1, 1]
    weight.sum().backward()
    assert [each.reads for each in sources] == [2, 2, 2]
    with torch.no_grad():
        assert not merged(coefficients, Reads(slot, sources, base)).requires_grad


def test_a_second_backward_pass_through_the_same_weight_adds_up():
    slot, sources, base, coefficients = made("mlp.up", (5, 3), "row+column", 2, "full")
    weight = merged(coefficients, Reads(slot, sources, base, dtype=torch.float64))
    weight.sum().backward()
    once = [each.grad.clone() for each in coefficients]
    weight.sum().backward()
    assert len(once) == 2
    assert all(torch.equal(each.grad, 2 * first) for each, first in zip(coefficients, once))


def test_rows_at_zero_change_nothing():
    both, sources, base, coefficients = made("mlp.up", (5, 3), "row+column", 2, "delta", torch.float32)
    alone, *_ = made("mlp.up", (5, 3), "column", 2, "delta", torch.float32)
    columns, rows = coefficients[0].detach().float(), torch.zeros(2, 5)
    assert torch.equal(
        merged([columns, rows], Reads(both, sources, base)), merged([columns], Reads(alone, sources, base))
    )


def test_sources_in_bfloat16_are_merged_in_float32_and_never_written_to():
    slot, sources, base, coefficients = made("mlp.up", (5, 3), "row+column", 2, "delta", torch.bfloat16)
    before = [each.tensor.clone() for each in (*sources, base)]
    weight = merged([each.detach().float().requires_grad_() for each in coefficients], Reads(slot, sources, base))
    assert weight.dtype == torch.float32
    weight.sum().backward()
    assert all(torch.equal(each.tensor, was) for each, was in zip((*sources, base), before))


def test_float32_sources_and_base_are_never_written_to():
    slot, sources, base, coefficients = made("mlp.up", (5, 3), "row+column", 2, "delta", torch.float32)
    before = base.tensor.clone()
    merged([each.detach().float() for each in coefficients], Reads(slot, sources, base))
    assert torch.equal(base.tensor, before)


def test_shapes_that_differ_are_refused():
    slot, sources, _, coefficients = made("mlp.up", (5, 3), "row+column", 2, "full")
    with pytest.raises(ShapeMismatch, match="w: the coefficients have shape"):
        merged([coefficients[0][:1], coefficients[1]], Reads(slot, sources))
    with pytest.raises(ShapeMismatch, match="w:rows: the coefficients have shape"):
        merged([coefficients[0], coefficients[0]], Reads(slot, sources))
    sources[1].tensor = torch.zeros(5, 4)
    with pytest.raises(ShapeMismatch, match="source 1"):
        merged(coefficients, Reads(slot, sources))
