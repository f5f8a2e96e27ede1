"""The names that transformers writes, and what they mean."""

from __future__ import annotations

import pytest

from mergetool.anatomy import ROLES
from mergetool.anatomy.families import FAMILIES, family_of

from .models import MODELS, on_disk

# model, tensor, role, layer, expert
EXAMPLES = [
    ("llama", "model.embed_tokens.weight", "embedding", None, None),
    ("llama", "model.layers.1.self_attn.q_proj.weight", "attention.q", 1, None),
    ("llama", "model.layers.1.self_attn.o_proj.weight", "attention.o", 1, None),
    ("llama", "model.layers.2.mlp.gate_proj.weight", "mlp.gate", 2, None),
    ("llama", "model.layers.2.input_layernorm.weight", "norm", 2, None),
    ("llama", "model.norm.weight", "norm", None, None),
    ("llama", "lm_head.weight", "head", None, None),
    ("qwen2", "model.layers.0.self_attn.k_proj.bias", "attention.k", 0, None),
    ("qwen3", "model.layers.0.self_attn.q_norm.weight", "attention.norm", 0, None),
    ("gemma2", "model.layers.0.pre_feedforward_layernorm.weight", "norm", 0, None),
    ("phi", "model.layers.0.self_attn.dense.weight", "attention.o", 0, None),
    ("phi", "model.layers.0.mlp.fc1.weight", "mlp.up", 0, None),
    ("phi3", "model.layers.0.self_attn.qkv_proj.weight", "attention.qkv", 0, None),
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight", "mlp.gate_up", 0, None),
    ("gpt2", "transformer.wpe.weight", "embedding.position", None, None),
    ("gpt2", "transformer.h.2.attn.c_attn.bias", "attention.qkv", 2, None),
    ("gpt2", "transformer.h.2.attn.c_proj.weight", "attention.o", 2, None),
    ("gpt2", "transformer.h.2.mlp.c_proj.weight", "mlp.down", 2, None),
    ("gpt2_bare", "h.0.mlp.c_fc.weight", "mlp.up", 0, None),
    ("gpt_neox", "gpt_neox.embed_in.weight", "embedding", None, None),
    ("gpt_neox", "embed_out.weight", "head", None, None),
    ("gpt_neox", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "mlp.down", 0, None),
    ("bert", "embeddings.word_embeddings.weight", "embedding", None, None),
    ("bert", "embeddings.token_type_embeddings.weight", "embedding.segment", None, None),
    ("bert", "encoder.layer.1.attention.self.query.weight", "attention.q", 1, None),
    ("bert", "encoder.layer.1.attention.output.dense.weight", "attention.o", 1, None),
    ("bert", "encoder.layer.1.attention.output.LayerNorm.bias", "norm", 1, None),
    ("bert", "encoder.layer.1.intermediate.dense.weight", "mlp.up", 1, None),
    ("bert", "encoder.layer.1.output.dense.weight", "mlp.down", 1, None),
    ("bert", "pooler.dense.weight", "head.transform", None, None),
    ("bert_pretraining", "cls.predictions.bias", "head", None, None),
    ("bert_pretraining", "cls.seq_relationship.weight", "head.classifier", None, None),
    ("bert_classifier", "classifier.weight", "head.classifier", None, None),
    ("roberta", "lm_head.dense.weight", "head.transform", None, None),
    ("roberta_classifier", "classifier.out_proj.weight", "head.classifier", None, None),
    ("distilbert", "distilbert.transformer.layer.0.attention.q_lin.weight", "attention.q", 0, None),
    ("distilbert", "distilbert.transformer.layer.0.ffn.lin2.weight", "mlp.down", 0, None),
    ("mpnet", "mpnet.encoder.layer.0.attention.attn.o.weight", "attention.o", 0, None),
    ("vit", "vit.embeddings.cls_token", "embedding.special", None, None),
    ("vit", "vit.embeddings.patch_embeddings.projection.weight", "embedding.patch", None, None),
    ("vit", "vit.encoder.layer.1.attention.attention.value.weight", "attention.v", 1, None),
    ("clip", "visual_projection.weight", "projector", None, None),
    ("clip", "logit_scale", "scale", None, None),
    ("siglip", "text_model.head.weight", "projector", None, None),
    ("t5", "shared.weight", "embedding", None, None),
    ("t5", "decoder.block.1.layer.1.EncDecAttention.k.weight", "attention.cross.k", 1, None),
    ("t5", "encoder.block.1.layer.1.DenseReluDense.wi.weight", "mlp.up", 1, None),
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "attention.bias", 0, None),
    ("t5_gated", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight", "mlp.gate", 1, None),
    ("bart", "model.decoder.layers.2.encoder_attn.q_proj.weight", "attention.cross.q", 2, None),
    ("bart", "model.decoder.layers.2.encoder_attn_layer_norm.weight", "norm", 2, None),
    ("whisper", "model.encoder.conv1.weight", "embedding.patch", None, None),
    ("mixtral", "model.layers.2.block_sparse_moe.gate.weight", "router", 2, None),
    ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w1.weight", "expert.gate", 2, 3),
    ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w2.weight", "expert.down", 2, 3),
    ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w3.weight", "expert.up", 2, 3),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert.up_proj.weight", "mlp.up", 0, None),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", "router", 0, None),
    ("qwen3_moe", "model.layers.0.mlp.experts.1.down_proj.weight", "expert.down", 0, 1),
    ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", "expert.gate_up", 0, None),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", "expert.gate_up", 0, None),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", "expert.down", 0, None),
    ("gpt_oss", "model.layers.0.self_attn.sinks", "attention.bias", 0, None),
    ("deepseek_v3", "model.layers.0.mlp.up_proj.weight", "mlp.up", 0, None),
    ("deepseek_v3", "model.layers.1.self_attn.q_a_proj.weight", "attention.q_a", 1, None),
    ("deepseek_v3", "model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "attention.kv_a", 1, None),
    ("deepseek_v3", "model.layers.1.self_attn.kv_a_layernorm.weight", "attention.norm", 1, None),
    ("deepseek_v3", "model.layers.1.mlp.shared_experts.gate_proj.weight", "mlp.gate", 1, None),
    ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "router", 1, None),
    ("mamba", "backbone.layers.1.mixer.in_proj.weight", "mixer.in", 1, None),
    ("mamba", "backbone.layers.1.mixer.A_log", "mixer.state", 1, None),
    ("mamba", "backbone.layers.1.mixer.dt_proj.bias", "mixer.step", 1, None),
    ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz.weight", "mixer.in", 0, None),
    ("lfm2", "model.layers.0.conv.conv.weight", "mixer.conv", 0, None),
    ("rwkv", "rwkv.blocks.0.feed_forward.value.weight", "mlp.down", 0, None),
    ("gemma3_vision", "multi_modal_projector.mm_input_projection_weight", "projector", None, None),
    ("gemma3_vision", "vision_tower.head.probe", "embedding.special", None, None),
]


@pytest.mark.parametrize(("model", "tensor", "role", "layer", "expert"), EXAMPLES)
def test_a_name_says_role_layer_and_expert(
    model: str, tensor: str, role: str, layer: int | None, expert: int | None
) -> None:
    part = on_disk(model).anatomy.parts[tensor]
    assert (part.role, part.layer, part.expert) == (role, layer, expert)


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_has_a_role(model: str) -> None:
    saved = on_disk(model)
    parts = saved.anatomy.parts
    assert list(parts) == list(saved.shapes)
    assert {part.role for part in parts.values()} <= set(ROLES)
    assert [name for name, part in parts.items() if part.role == "other"] == []


@pytest.mark.parametrize("model", MODELS)
def test_depth_runs_from_zero_to_one_in_every_stack(model: str) -> None:
    for name, part in on_disk(model).anatomy.parts.items():
        if part.layer is not None:
            expected = part.layer / (part.layers - 1) if part.layers > 1 else 1.0
            assert part.depth == expected, name
        else:
            assert part.depth in (0.0, 1.0), name
        if part.role.startswith("embedding"):
            assert part.layer is not None or part.depth == (1.0 if ".head." in name else 0.0), name
        if part.role.startswith("head"):
            assert part.depth == 1.0, name


@pytest.mark.parametrize(
    ("model", "name", "depth"),
    [
        ("bert", "embeddings.LayerNorm.weight", 0.0),
        ("bloom", "transformer.word_embeddings_layernorm.weight", 0.0),
        ("bart", "model.decoder.layernorm_embedding.weight", 0.0),
        ("clip", "vision_model.pre_layrnorm.weight", 0.0),
        ("clip", "vision_model.post_layernorm.weight", 1.0),
        ("lfm2", "model.embedding_norm.weight", 1.0),
        ("bart", "model.decoder.layers.1.fc1.weight", 0.5),
    ],
)
def test_depth_of_what_is_hard_to_tell(model: str, name: str, depth: float) -> None:
    assert on_disk(model).anatomy.parts[name].depth == depth


def test_towers_are_stacks_of_their_own() -> None:
    clip, bart = on_disk("clip").anatomy.parts, on_disk("bart").anatomy.parts
    assert clip["text_model.encoder.layers.0.mlp.fc1.weight"].layers == 3
    assert clip["vision_model.encoder.layers.0.mlp.fc1.weight"].layers == 2
    assert clip["vision_model.post_layernorm.weight"].stack == "vision_model.encoder.layers"
    assert clip["visual_projection.weight"].stack == ""
    assert bart["model.encoder.layers.0.fc1.weight"].layers == 2
    assert bart["model.decoder.layers.0.fc1.weight"].layers == 3
    assert bart["model.shared.weight"].stack == ""


@pytest.mark.parametrize("model", MODELS)
def test_ties_are_those_of_transformers(model: str) -> None:
    saved = on_disk(model)
    if model == "gemma3_vision":  # transformers speaks of names in memory, the disk keeps the older prefix
        expected = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    else:
        expected = saved.tied
    assert saved.anatomy.tied == expected


def test_default_ties_are_those_of_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    ours, theirs = {}, {}
    for model_type in " ".join(f"{family.tied} {family.untied}" for family in FAMILIES).split():
        if model_type in CONFIG_MAPPING:  # others come with code of their own
            default = getattr(CONFIG_MAPPING[model_type](), "tie_word_embeddings", None)
            if default is not None:  # a vision model has nothing to tie
                theirs[model_type] = default
                ours[model_type] = family_of({"model_type": model_type})[1]
    assert len(ours) > 100
    assert ours == theirs


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        ("llama", {"model.embed_tokens.weight": 0, "lm_head.weight": 0}),
        ("gpt2", {"transformer.wte.weight": 0}),
        ("phi", {"model.embed_tokens.weight": 0, "lm_head.weight": 0, "lm_head.bias": 0}),
        ("bert_pretraining", {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0}),
        ("bert_classifier", {"bert.embeddings.word_embeddings.weight": 0}),
        ("bart", {"model.shared.weight": 0, "final_logits_bias": 1}),
        ("clip", {"text_model.embeddings.token_embedding.weight": 0}),
        ("vit", {}),
        ("mamba", {"backbone.embeddings.weight": 0}),
        ("modernbert", {"model.embeddings.tok_embeddings.weight": 0, "decoder.bias": 0}),
    ],
)
def test_the_vocabulary_axis_is_that_of_embeddings_and_heads(model: str, axes: dict[str, int]) -> None:
    parts = on_disk(model).anatomy.parts
    found = {name: part.vocabulary_axis for name, part in parts.items() if part.vocabulary_axis is not None}
    assert found == axes


@pytest.mark.parametrize(
    ("model", "endings"),
    [
        ("llama", set()),
        ("deepseek_v3", {"e_score_correction_bias"}),
        ("mamba", {"A_log", "D"}),
        ("mamba2", {"A_log", "D", "dt_bias"}),
        ("qwen3_next", {"A_log", "dt_bias"}),
    ],
)
def test_delicate_tensors_keep_their_dtype(model: str, endings: set[str]) -> None:
    parts = on_disk(model).anatomy.parts
    assert {name.rpartition(".")[2] for name, part in parts.items() if part.keep_dtype} == endings
