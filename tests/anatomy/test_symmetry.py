"""Symmetries leave the function alone, compose, and are refused where they are not known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetool.anatomy import (
    DEFAULT_KINDS,
    Group,
    Member,
    Row,
    Turning,
    anatomy,
    axis_indices,
    symmetries,
    turned_array,
)
from mergetool.errors import PlanError

from .plain import conv, mlp
from .symmetric import made, outputs, random_permutations, turned

ALL = (*DEFAULT_KINDS, "residual")
FAMILIES = [
    *("gpt2", "gpt_neox", "gptj", "bloom", "opt", "bert", "roberta", "distilbert", "albert", "deberta", "modernbert"),
    *("vit", "dinov2", "t5_gated", "bart", "llama", "gqa", "mqa", "gqa_biases", "mistral", "qwen2", "qwen3", "gemma3"),
    *("phi3", "phi3_gqa", "olmo2", "cohere", "stablelm", "mixtral", "qwen2_moe", "qwen3_experts", "olmoe_experts"),
    *("granitemoe", "gpt_oss"),
]
WITH_RESIDUAL = ["gpt2", "bert_classifier", "vit", "llama", "qwen3", "phi3", "mixtral", "olmoe_experts", "gpt_oss"]


def unchanged(model, groups):
    """Whether the outputs are what they were, and the tensors are not."""
    permutations = random_permutations(groups)
    other = turned(model.tensors, groups, permutations)
    assert set(other) == set(model.tensors)
    moved = [name for name in other if not np.array_equal(other[name], model.tensors[name])]
    assert moved
    before, after = outputs(model, model.tensors), outputs(model, other)
    return np.abs(before).max() > 0.1 and np.abs(before - after).max() < 1e-4 * max(1.0, np.abs(before).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turned_model_computes_the_same(name):
    model = made(name)
    assert unchanged(model, model.groups())


@pytest.mark.parametrize("name", WITH_RESIDUAL)
def test_a_turned_residual_stream_computes_the_same(name):
    model = made(name)
    assert unchanged(model, model.groups(ALL))


@pytest.mark.parametrize("make", [mlp, conv])
def test_a_turned_plain_network_computes_the_same(make):
    model = make()
    groups = model.groups()
    other = turned(model.tensors, groups, random_permutations(groups))
    np.testing.assert_allclose(model.outputs(other), model.outputs(model.tensors), atol=1e-5)


def sizes(groups, kind):
    return [group.size for group in groups if group.kind == kind]


def test_a_llama_with_grouped_queries_has_these_groups():
    groups = made("gqa").groups()

    assert sizes(groups, "mlp") == [48] * 3
    assert sizes(groups, "heads") == [3, 4, 4, 4] * 3
    assert sizes(groups, "vo") == [8] * 9
    assert [group.name for group in groups if group.name.startswith("model.layers.1.")] == [
        "model.layers.1.mlp",
        "model.layers.1.heads",
        *(f"model.layers.1.heads.{group}" for group in range(3)),
        *(f"model.layers.1.vo.{group}" for group in range(3)),
    ]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_experts_and_their_hidden_units_are_groups(name):
    groups = [group for group in made(name).groups() if group.name.startswith("model.layers.0.experts")]

    assert [group.size for group in groups if group.kind == "experts"] == [4]
    assert [group.unit for group in groups if group.kind == "mlp"] == [0, 1, 2, 3]


def test_convolutions_matrices_and_norms_of_a_plain_network():
    groups = conv().groups()

    assert [(group.name, group.size) for group in groups] == [
        ("conv1.units", 12),
        ("conv2.units", 10),
        ("fc1.units", 16),
    ]
    assert {member.tensor for member in groups[0].members} == {
        *(f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
        *("conv1.weight", "conv1.bias", "conv2.weight"),
    }
    assert groups[1].members[-1] == Member("fc1.weight", 1, 4, 0, 40, role="input")


@pytest.mark.parametrize("name", ["gqa", "gpt2", "gpt_neox", "mixtral", "gpt_oss", "bert_classifier"])
def test_names_are_unique_and_no_group_touches_the_vocabulary(name):
    model = made(name)
    shapes = {name: values.shape for name, values in model.tensors.items()}
    parts = anatomy(model.config, shapes).parts
    groups = model.groups(ALL)

    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        for member in group.members:
            assert member.axis != parts[member.tensor].vocabulary_axis
            assert member.places().shape == (group.size, member.block)
            assert 0 <= member.start < member.stop <= shapes[member.tensor][member.axis]


@pytest.mark.parametrize(
    ("name", "kinds", "what"),
    [
        ("falcon", DEFAULT_KINDS, "how queries, keys and values are fused in transformer.h.0"),
        ("deepseek_v3", DEFAULT_KINDS, "kv_a_proj_with_mqa"),
        ("qwen3_next", DEFAULT_KINDS, "q_proj.weight has 64 outputs where its heads make 32"),
        ("rwkv", DEFAULT_KINDS, "where down reads"),
        ("diffllama", DEFAULT_KINDS, "self_attn.lambda_k1"),
        ("doge", DEFAULT_KINDS, "self_attn.A"),
        ("bitnet", DEFAULT_KINDS, "mlp.ffn_sub_norm.weight is to its hidden units"),
        ("norms_of_heads", DEFAULT_KINDS, "the norm .*norms.0.weight"),
        ("xglm", ALL, "how it knows positions"),
        ("bert", ALL, "the model has no head"),
        ("t5", ALL, "2 stacks of layers"),
        ("mamba", ALL, "mixer.A_log"),
    ],
)
def test_what_is_unknown_is_named(name, kinds, what):
    with pytest.raises(PlanError, match=what) as error:
        made(name).groups(kinds)
    assert all("align" in problem.fix for problem in error.value.problems)


def test_other_groups_of_an_unknown_attention_are_known():
    model = made("deepseek_experts")

    assert unchanged(model, model.groups(("mlp", "experts")))


def test_experts_stay_in_their_routing_groups():
    groups = made("deepseek_experts").groups(("experts",))

    assert [(group.name, group.size) for group in groups[:2]] == [
        ("model.layers.1.experts.group.0", 4),
        ("model.layers.1.experts.group.1", 4),
    ]


@pytest.mark.parametrize(
    "shapes",
    [
        {"fc1.weight": (8, 4), "fc2.weight": (3, 9)},
        {"conv1.weight": (8, 3, 3, 3), "norm1.weight": (8,), "norm1.bias": (8,), "fc.weight": (2, 8)},
        {"a.weight": (8, 4), "a.other": (8, 8), "b.weight": (2, 8)},
        {"fc1.weight": (8, 4), "norm.weight": (5,), "fc2.weight": (3, 8)},
    ],
)
def test_a_plain_network_in_no_line_is_refused(shapes):
    with pytest.raises(PlanError, match="its symmetries are unknown"):
        symmetries(anatomy({}, shapes), {}, shapes)


def test_heads_with_slopes_of_their_own_stay():
    assert {group.kind for group in made("bloom").groups()} == {"mlp", "vo"}
    assert {group.kind for group in made("t5").groups()} == {"mlp", "vo"}


# Heads of two dimensions, three of them, and what is inside of each.
NESTED = (
    Group("heads", "heads", 3, (Member("w", 0, 2, 0, 6), Member("o", 1, 2, 0, 6))),
    *(
        Group(
            f"vo.{head}",
            "vo",
            2,
            (Member("w", 0, 1, 2 * head, 2 * head + 2), Member("o", 1, 1, 2 * head, 2 * head + 2)),
        )
        for head in range(3)
    ),
)


@given(st.permutations(range(3)), st.lists(st.permutations(range(2)), min_size=3, max_size=3))
def test_nested_groups_compose_from_the_inside_out(outer, inner):
    permutations = {"heads": np.array(outer), **{f"vo.{head}": np.array(each) for head, each in enumerate(inner)}}
    values = np.arange(24.0).reshape(6, 4)

    # By hand: first inside every head of the source, then the heads.
    heads = [values[2 * head : 2 * head + 2][inner[head]] for head in range(3)]
    expected = np.concatenate([heads[head] for head in outer])

    rows = axis_indices(NESTED, permutations, "w", (6, 4))
    columns = axis_indices(NESTED, permutations, "o", (5, 6))
    np.testing.assert_array_equal(turned_array(values, rows), expected)
    assert (1 in columns) == (0 in rows)
    np.testing.assert_array_equal(turned_array(np.ones((5, 1)) * values[:, 0], columns)[0], expected[:, 0])


@given(st.permutations(range(3)), st.lists(st.permutations(range(4)), min_size=3, max_size=3))
def test_experts_in_one_tensor_have_orders_of_their_own(outer, inner):
    groups = (
        Group("experts", "experts", 3, (Member("w", 0, 1, 0, 3),)),
        *(Group(f"mlp.{e}", "mlp", 4, (Member("w", 2, 1, 0, 4, slab=e),)) for e in range(3)),
    )
    permutations = {"experts": np.array(outer), **{f"mlp.{e}": np.array(each) for e, each in enumerate(inner)}}
    values = np.arange(24.0).reshape(3, 2, 4)

    expected = np.stack([values[e][:, inner[e]] for e in outer])
    np.testing.assert_array_equal(turned_array(values, axis_indices(groups, permutations, "w", (3, 2, 4))), expected)


@given(st.permutations(range(3)), st.lists(st.permutations(range(4)), min_size=3, max_size=3))
def test_experts_with_tensors_of_their_own_change_names(outer, inner):
    names = tuple(f"experts.{e}.w" for e in range(3))
    groups = (
        Group("experts", "experts", 3, (Member("router", 0, 1, 0, 3),), (Row(names),)),
        *(Group(f"mlp.{e}", "mlp", 4, (Member(names[e], 0, 1, 0, 4),)) for e in range(3)),
    )
    permutations = {"experts": np.array(outer), **{f"mlp.{e}": np.array(each) for e, each in enumerate(inner)}}
    turning = Turning(groups, permutations)
    for place, source in enumerate(outer):
        turn = turning.of(names[place], (4,))
        assert turn.tensor == names[source]
        assert turning.place(names[source]) == names[place]
        np.testing.assert_array_equal(turned_array(np.arange(4), turn.indices), inner[source])


def test_a_permutation_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no permutation of its 3 units"):
        Turning(NESTED, {"heads": np.array([0, 0, 1])})
    with pytest.raises(ValueError, match="no group 'mlp'"):
        Turning(NESTED, {"mlp": np.array([0])})
