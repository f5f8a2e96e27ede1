"""Which coefficients a weight has, and the float64 merge that they make."""

from dataclasses import replace

import numpy as np
import pytest

from mergetool.anatomy import Part, anatomy
from mergetool.errors import ShapeMismatch
from mergetool.facts.dam import KINDS, apply, initial, kind_of, slots
from tests.conftest import CONFIG, llama_shapes


def part(role, layer=None, expert=None):
    return Part(role, "model.layers" if layer is not None else "", layer, 2, 0.0, expert, None, False)


def drawn(role, shape, granularity="column", **more):
    name = more.pop("name", "w")
    (slot,) = slots({name: part(role, **more)}, {name: shape}, granularity=granularity)
    return slot


@pytest.mark.parametrize(
    ("role", "shape", "column", "row", "tensor"),
    [
        ("attention.q", (6, 4), (1,), (0,), ()),
        ("attention.q", (6,), (), (), ()),  # a bias
        ("embedding", (9, 4), (1,), (0,), ()),
        ("embedding.special", (4,), (0,), (0,), ()),
        ("embedding.patch", (6, 3, 2, 2), (1,), (0,), ()),
        ("norm", (4,), (0,), (0,), ()),
        ("expert.gate_up", (3, 6, 4), (0, 2), (0, 1), (0,)),  # all experts in one tensor
        ("expert.gate_up", (3, 6), (0,), (0,), (0,)),  # and their biases
        ("other", (6, 4), (1,), (0,), ()),
        ("other", (6,), (), (), ()),
    ],
)
def test_a_weight_has_a_coefficient_for_each_column_row_or_tensor(role, shape, column, row, tensor):
    found = [drawn(role, shape, granularity).axes for granularity in ("column", "row", "tensor", "layer")]
    assert found == [column, row, tensor, ()]


@pytest.mark.parametrize(
    ("role", "shape", "columns", "rows"),
    [
        ("attention.q", (6, 4), (1,), (0,)),
        ("attention.q", (6,), (), None),
        ("embedding", (9, 4), (1,), (0,)),
        ("embedding.special", (4,), (0,), None),
        ("embedding.patch", (6, 3, 2, 2), (1,), (0,)),
        ("norm", (4,), (0,), None),
        ("scale", (), (), None),
        ("expert.gate_up", (3, 6, 4), (0, 2), (0, 1)),
        ("expert.gate_up", (3, 6), (0,), None),
        ("buffer", (6, 4), (), None),
    ],
)
def test_rows_are_added_where_a_weight_has_rows_and_columns(role, shape, columns, rows):
    slot = drawn(role, shape, "row+column")
    assert (slot.axes, slot.label, slot.added) == (columns, "w", False)
    assert (slot.rows and slot.rows.axes) == rows
    assert [each.label for each in slot.sets] == ["w", "w:rows"][: 1 + (rows is not None)]
    assert len({each.key for each in slot.sets}) == len(slot.sets)
    assert slot.untrained().sets == (replace(slot, trained=False, rows=None),)


def test_rows_of_what_is_not_trained_are_left_out():
    shapes = {"w": (4, 6)}
    (slot,) = slots({"w": part("mlp.up")}, shapes, trainable=["norm"])
    assert (slot.axes, slot.rows, slot.trained) == ((1,), None, False)


def test_an_expert_on_its_own_has_the_coefficients_that_it_has_in_a_stack():
    alone = drawn("expert.down", (6, 4), expert=1)
    stacked = drawn("expert.down", (3, 6, 4))
    assert alone.coefficients(2) == (2, 4)
    assert stacked.coefficients(2) == (2, 3, 4)


def test_columns_of_a_transposed_weight_are_its_rows():
    shapes, parts = {"w": (4, 6)}, {"w": part("mlp.up")}
    assert slots(parts, shapes, transposed=frozenset({"w"}))[0].axes == (0,)
    assert slots(parts, shapes, transposed=frozenset({"w"}))[0].rows.axes == (1,)
    assert slots(parts, shapes, granularity="row", transposed=frozenset({"w"}))[0].axes == (1,)


def test_the_weights_of_a_layer_share_their_coefficients():
    shapes = llama_shapes()
    found = {slot.name: slot.key for slot in slots(anatomy(CONFIG, shapes).parts, shapes, granularity="layer")}
    assert found["model.layers.0.mlp.up_proj.weight"] == found["model.layers.0.input_layernorm.weight"]
    assert found["model.layers.0.mlp.up_proj.weight"] != found["model.layers.1.mlp.up_proj.weight"]
    assert len(set(found.values())) == 2 + 3  # layers; embedding, last norm, head


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_parts_named_are_trained(kind):
    shapes = llama_shapes()
    parts = anatomy(CONFIG, shapes).parts
    for slot in slots(parts, shapes, trainable=[kind]):
        assert slot.trained == (kind_of(parts[slot.name]) == kind)


def test_an_output_head_is_linear_and_a_buffer_is_never_trained():
    assert kind_of(part("head")) == "linear"
    assert kind_of(part("attention.norm", 0)) == "norm"
    assert kind_of(part("buffer")) is None
    assert not drawn("buffer", (4,)).trained


def test_layers_of_plain_networks_are_linear():
    shapes = {
        "layers.0.weight": (6, 4),
        "layers.0.bias": (6,),
        "conv.weight": (8, 3, 2, 2),
        "scale": (6,),
        "head.weight": (3, 6),
    }
    found = {each.name: each for each in slots(anatomy({"model_type": "mlp"}, shapes).parts, shapes)}
    assert {name: each.axes for name, each in found.items() if each.trained} == {
        "layers.0.weight": (1,),
        "layers.0.bias": (),
        "conv.weight": (1,),
        "head.weight": (1,),
    }


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="granularity must be one of"):
        slots({}, {}, granularity="block")
    with pytest.raises(ValueError, match="trainable parts are"):
        slots({}, {}, trainable=["bias"])
    with pytest.raises(ValueError, match="form must be one of"):
        initial("both", 2)


@pytest.mark.parametrize("count", [2, 3])
def test_the_merge_is_a_sum_of_scaled_columns(count):
    random = np.random.default_rng(0)
    sources, base = random.normal(size=(count, 5, 4)), random.normal(size=(5, 4))
    c = random.normal(size=(count, 4)).astype(np.float32)
    full = sum(w @ np.diag(x.astype(np.float64)) for w, x in zip(sources, c))
    delta = base + sum((w - base) @ np.diag(x.astype(np.float64)) for w, x in zip(sources, c))
    assert apply([(c, (1,))], sources) == pytest.approx(full, rel=1e-14)
    assert apply([(c, (1,))], sources, base) == pytest.approx(delta, rel=1e-14)


@pytest.mark.parametrize("count", [2, 3])
def test_rows_are_scaled_and_added_to_scaled_columns(count):
    random = np.random.default_rng(0)
    sources, base = random.normal(size=(count, 5, 4)), random.normal(size=(5, 4))
    c, r = random.normal(size=(count, 4)), random.normal(size=(count, 5))
    wanted = base.copy()
    for o in range(5):
        for j in range(4):
            wanted[o, j] += sum((c[i, j] + r[i, o]) * (sources[i, o, j] - base[o, j]) for i in range(count))
    assert apply([(c, (1,)), (r, (0,))], sources, base) == pytest.approx(wanted, rel=1e-13)


def test_equal_coefficients_make_the_average_in_both_forms():
    random = np.random.default_rng(0)
    sources, base = random.normal(size=(3, 5, 4)), random.normal(size=(5, 4))
    c = np.full((3, 5), 1 / 3)
    assert apply([(c, (0,))], sources) == pytest.approx(sources.mean(0))
    assert apply([(c, (0,))], sources, base) == pytest.approx(sources.mean(0))


def test_what_does_not_fit_is_refused():
    sources = [np.zeros((5, 4)), np.zeros((5, 3))]
    with pytest.raises(ShapeMismatch, match=r"source 1 has shape \(5, 3\)"):
        apply([(np.zeros((2, 4)), (1,))], sources)
    with pytest.raises(ShapeMismatch, match=r"not \(2, 4\)"):
        apply([(np.zeros((2, 5)), (1,))], [np.zeros((5, 4))] * 2)
    with pytest.raises(ShapeMismatch, match=r"not \(2, 5\)"):
        apply([(np.zeros((2, 4)), (1,)), (np.zeros((2, 4)), (0,))], [np.zeros((5, 4))] * 2)
