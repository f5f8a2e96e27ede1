"""Names that no library lists."""

from __future__ import annotations

import dataclasses
import time

import pytest

from mergetool.anatomy import ROLES, Part, anatomy, matches_role


def parts(names: str | list[str], **config: object) -> dict[str, Part]:
    names = names.split() if isinstance(names, str) else names
    return dict(anatomy(config, dict.fromkeys(names, (8, 8))).parts)


def test_an_unlisted_model_that_spells_like_llama_is_understood() -> None:
    found = parts(
        "model.embed_tokens.weight model.layers.0.self_attn.q_proj.weight model.layers.3.mlp.down_proj.weight "
        "model.norm.weight lm_head.weight",
        model_type="brand_new",
    )
    assert [part.role for part in found.values()] == ["embedding", "attention.q", "mlp.down", "norm", "head"]
    assert [part.depth for part in found.values()] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert {part.stack for part in found.values()} == {"model.layers"}


def test_nothing_is_dropped_however_odd_the_name() -> None:
    names = ["", ".", "weight", "7", "a.b", "3.weight", "x..y", "layers.2", "experts.1.w", "é.1.ß", "9" * 5000 + ".w"]
    assert list(parts(names)) == names


def test_layers_may_differ_from_each_other() -> None:
    found = parts(
        "model.layers.0.self_attn.q_proj.weight model.layers.1.mamba.A_log model.layers.2.mlp.up_proj.weight "
        "model.layers.4.block_sparse_moe.experts.11.w1.weight"
    )
    assert [part.depth for part in found.values()] == [0.0, 0.25, 0.5, 1.0]
    assert {part.layers for part in found.values()} == {5}


@pytest.mark.parametrize(
    ("name", "layer", "expert"),
    [
        ("model.layers.3.mlp.experts.17.up_proj.weight", 3, 17),
        ("encoder.block.3.layer.1.mlp.experts.expert_17.wi.weight", 3, 17),
        ("experts.17.fc1.weight", None, 17),
        ("model.layers.3.mlp.experts.gate_up_proj", 3, None),
        ("model.layers.3.mlp.shared_experts.0.up_proj.weight", 3, None),
        ("0.auto_model.encoder.layer.3.output.dense.weight", 3, None),
        ("mtp.layers.0.mlp.experts.5.w2.weight", 0, 5),
    ],
)
def test_experts_are_not_taken_for_layers(name: str, layer: int | None, expert: int | None) -> None:
    part = parts([name])[name]
    assert (part.layer, part.expert) == (layer, expert)


def test_fused_and_quantised_experts_have_the_role_of_their_matrix() -> None:
    block = "model.layers.0.mlp.experts."
    found = parts(
        f"{block}gate_up_proj {block}down_proj {block}gate_up_proj_bias {block}down_proj_blocks "
        f"{block}gate_up_proj_scales {block}3.up_proj.weight_scale_inv {block}3.down_proj.weight_packed"
    )
    assert [part.role for part in found.values()] == [
        "expert.gate_up",
        "expert.down",
        "expert.gate_up",
        "expert.down",
        "expert.gate_up",
        "expert.up",
        "expert.down",
    ]


def test_layers_that_predict_further_tokens_do_not_stretch_the_rest() -> None:
    names = [f"model.layers.{number}.self_attn.o_proj.weight" for number in range(62)]
    extra = ["model.layers.61.eh_proj.weight", "model.layers.61.shared_head.head.weight"]
    for found in (parts(names + extra), parts(names, num_hidden_layers=61, num_nextn_predict_layers=1)):
        assert found[names[30]].depth == 0.5
        assert found[names[60]].depth == found[names[61]].depth == 1.0
        assert (found[names[61]].layer, found[names[61]].layers) == (61, 61)


def test_names_win_over_a_config_that_says_otherwise() -> None:
    found = parts([f"model.layers.{number}.mlp.up_proj.weight" for number in range(5)], num_hidden_layers=3)
    assert [part.depth for part in found.values()] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_stack_of_one_layer_is_all_depth_one() -> None:
    assert parts("model.layers.0.mlp.up_proj.weight")["model.layers.0.mlp.up_proj.weight"].depth == 1.0


def test_a_unet_has_stacks_by_prefix() -> None:
    found = parts(
        "time_embed.0.weight input_blocks.0.0.weight input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight "
        "middle_block.1.norm.weight output_blocks.2.0.in_layers.0.weight out.2.weight"
    )
    assert [(part.stack, part.layer, part.depth) for part in found.values()] == [
        ("", None, 0.0),
        ("input_blocks", 0, 0.0),
        ("input_blocks", 4, 1.0),
        ("middle_block", 1, 1.0),
        ("output_blocks", 2, 1.0),
        ("", None, 1.0),
    ]
    assert found["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"].role == "attention.cross.k"


def test_a_bare_sequence_has_layers_where_nothing_else_has() -> None:
    assert [part.layer for part in parts("net.0.weight net.2.weight net.4.bias").values()] == [0, 2, 4]
    mixed = parts("visual.blocks.1.attn.qkv.weight visual.merger.mlp.0.weight visual.merger.mlp.2.weight")
    assert [(part.layer, part.role) for part in mixed.values()] == [
        (1, "attention.qkv"),
        (None, "projector"),
        (None, "projector"),
    ]


def test_vision_and_language_prefixes() -> None:
    found = parts(
        "model.language_model.embed_tokens.weight model.language_model.layers.1.mlp.up_proj.weight lm_head.weight "
        "model.visual.blocks.3.norm1.weight model.visual.patch_embed.proj.weight model.visual.merger.ln_q.weight",
        model_type="qwen2_5_vl",
    )
    assert [part.stack for part in found.values()] == ["model.language_model.layers"] * 3 + ["model.visual.blocks"] * 3
    assert found["lm_head.weight"].layers == 2


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.position_ids",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "bn1.num_batches_tracked",
    ],
)
def test_buffers_are_no_weights(name: str) -> None:
    part = parts([name])[name]
    assert (part.role, part.keep_dtype) == ("buffer", True)


def test_few_rows_are_no_vocabulary() -> None:
    shapes = {"model.embed_tokens.weight": (1000, 8), "speaker.embedding.weight": (10, 8), "lm_head.weight": (1024, 8)}
    for config in ({}, {"vocab_size": 1000}, {"text_config": {"vocab_size": 1000}}):
        found = anatomy(config, shapes).parts
        assert [part.vocabulary_axis for part in found.values()] == [0, None, 0]


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CAUSAL = ["BrandNewForCausalLM"]


@pytest.mark.parametrize(
    ("config", "names", "tied"),
    [
        ({}, [EMBED], {}),
        ({}, [EMBED, HEAD], {}),
        ({"tie_word_embeddings": True}, [EMBED], {HEAD: EMBED}),
        ({"tie_word_embeddings": True}, [EMBED, HEAD], {HEAD: EMBED}),
        ({"tie_word_embeddings": True}, [HEAD], {EMBED: HEAD}),
        ({"tie_word_embeddings": False}, [EMBED, HEAD], {}),
        ({"text_config": {"tie_word_embeddings": True}}, [EMBED], {HEAD: EMBED}),
        ({"model_type": "llama"}, [EMBED, HEAD], {}),
        ({"model_type": "gemma2"}, [EMBED], {HEAD: EMBED}),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"]}, [EMBED], {}),
        ({"model_type": "brand_new", "architectures": CAUSAL}, [EMBED], {HEAD: EMBED}),
        ({"model_type": "brand_new", "architectures": CAUSAL}, [EMBED, HEAD], {}),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["wte.weight"], {HEAD: "wte.weight"}),
        ({"model_type": "gpt2"}, ["h.0.ln_1.weight"], {}),
        (
            {"model_type": "t5", "tie_word_embeddings": False},
            ["shared.weight", "encoder.block.0.layer.0.layer_norm.weight", HEAD],
            {"encoder.embed_tokens.weight": "shared.weight"},
        ),
        (
            {"model_type": "bart"},
            ["model.decoder.embed_tokens.weight", "model.encoder.layers.0.fc1.weight"],
            dict.fromkeys(
                ("model.shared.weight", "model.encoder.embed_tokens.weight", HEAD),
                "model.decoder.embed_tokens.weight",
            ),
        ),
        (
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}, "architectures": CAUSAL},
            [EMBED],
            {HEAD: EMBED},
        ),
    ],
)
def test_ties(config: dict[str, object], names: list[str], tied: dict[str, str]) -> None:
    assert anatomy(config, dict.fromkeys(names, (8, 8))).tied == tied


def test_names_of_different_shapes_are_not_one_weight() -> None:
    shapes = {EMBED: (8, 8), HEAD: (16, 8)}
    assert anatomy({"tie_word_embeddings": True}, shapes).tied == {}


def test_a_config_of_wrong_types_does_no_harm() -> None:
    config = {"model_type": ["x"], "text_config": 3, "num_hidden_layers": [1], "architectures": None, "vocab_size": "x"}
    assert parts("model.layers.0.mlp.up_proj.weight", **config)


def test_matches_role() -> None:
    assert matches_role("attention.q", "attention")
    assert matches_role("attention.q", "attention.q")
    assert not matches_role("attention.q", "attention.qkv")
    assert not matches_role("attention.qkv", "attention.q")
    assert not matches_role("attention_other", "attention")


def test_roles_are_described_and_parts_frozen() -> None:
    assert all(text and not text.endswith(".") for text in ROLES.values())
    part = parts("x.weight")["x.weight"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.role = "head"  # type: ignore[misc]


def test_fifty_thousand_names_are_read_in_a_moment() -> None:
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight": (4, 4)
        for layer in range(65)
        for expert in range(256)
        for matrix in ("gate", "up", "down")
    }
    start = time.process_time()
    assert len(anatomy({"model_type": "deepseek_v3"}, shapes).parts) == 49920
    assert time.process_time() - start < 2  # a quarter of a second where nothing else runs
