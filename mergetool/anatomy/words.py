"""The words that models are spelt with: which block a component names, and what a leaf of it does."""

from __future__ import annotations

import re
from collections.abc import Mapping


def table(text: str) -> dict[str, str]:
    """Read lines ``meaning: word word …`` into ``{word: meaning}``; a line without a colon goes on."""
    meaning, result = "", {}
    for line in text.strip().splitlines():
        head, colon, words = line.rpartition(":")
        meaning = head.strip() if colon else meaning
        result.update(dict.fromkeys(words.split(), meaning))
    return result


# A component of a name opens a block. The innermost block decides, except that routed experts and
# cross-attention also decide for what lies inside them.
BLOCKS: Mapping[str, str] = table("""
    attention: self_attn attn attention self_attention SelfAttention attn1
    cross:     encoder_attn EncDecAttention crossattention cross_attn cross_attention attn2
    mlp:       mlp ffn feed_forward feedforward DenseReluDense ff shared_mlp
    shared:    shared_expert shared_experts
    moe:       block_sparse_moe moe sparse_moe
    expert:    experts expert local_experts
    mixer:     mixer mamba linear_attn ssm conv
    head:      lm_head cls predictions generator_predictions discriminator_predictions classifier
               pooler head shared_head
""")

# Inside these, every tensor but a norm has the one role.
SWALLOWING: Mapping[str, str] = table("""
    router:          router shared_expert_gate moe_statics e_score_correction_bias expert_bias
    embedding.patch: patch_embed patch_embedding patch_embeddings patch_embedder
    projector:       multi_modal_projector mm_projector merger connector modality_projection aligner resampler
                     deepstack_merger_list eh_proj visual_projection text_projection embeddings_project
                     embedding_hidden_mapping_in project_in project_out
""")

# What a leaf does, whatever block it stands in; a leaf is the last component or the last two.
LEAVES: Mapping[str, str] = table("""
    embedding:          embed_tokens wte word_embeddings tok_embeddings token_embedding token_embeddings
                        embed_in embedding embeddings shared tokens_embed
    embedding.position: wpe embed_positions position_embeddings position_embedding pos_embed
                        positional_embedding rel_embeddings positions_embed
    embedding.segment:  token_type_embeddings
    embedding.special:  cls_token class_embedding class_token mask_token distillation_token dist_token
                        register_tokens reg_token probe masked_spec_embed
    attention.q:        q_proj q_lin query_proj to_q wq add_q_proj q_attn
    attention.k:        k_proj k_lin key_proj to_k wk add_k_proj
    attention.v:        v_proj v_lin value_proj to_v wv add_v_proj
    attention.qkv:      qkv_proj query_key_value Wqkv wqkv c_attn W_pack qkv
    attention.kv:       kv_proj key_value Wkv
    attention.q_a:      q_a_proj
    attention.q_b:      q_b_proj
    attention.kv_a:     kv_a_proj_with_mqa kv_a_proj
    attention.kv_b:     kv_b_proj
    attention.o:        o_proj out_lin to_out to_add_out
    attention.bias:     relative_attention_bias relative_position_bias_table sinks
    mlp.gate:           gate_proj wi_0
    mlp.up:             up_proj fc1 fc_in c_fc dense_h_to_4h intermediate.dense intermediate_dense lin1 wi
                        wi_1 linear_fc1
    mlp.gate_up:        gate_up_proj Wi
    mlp.down:           down_proj fc2 fc_out dense_4h_to_h output.dense output_dense lin2 ffn_output
                        linear_fc2
    mixer.state:        A_log D dt_bias
    mixer.step:         x_proj dt_proj
    mixer.conv:         conv1d
    scale:              logit_scale logit_bias
    head:               lm_head embed_out proj_out output output_layer vocab_projector generator_lm_head
                        final_logits_bias predictions cls head
    head.classifier:    classifier score qa_outputs seq_relationship dense_prediction
    head.transform:     pre_classifier vocab_transform pooler
    buffer:             position_ids inv_freq masked_bias num_batches_tracked running_mean running_var
                        relative_position_index
""")

_MLP = """
    mlp.gate:    w1 linear_v
    mlp.up:      w3 v1 ffn dense1 linear_1 net.proj
    mlp.gate_up: input_linear
    mlp.down:    w2 wo Wo c_proj output_linear dense2 linear_2 net
"""

# What a leaf does in one kind of block, where its word alone would not tell. Comes before LEAVES.
BLOCK_LEAVES: Mapping[str, Mapping[str, str]] = {
    "attention": table("""
    attention.q:   q query
    attention.k:   k key
    attention.v:   v value
    attention.qkv: in_proj
    attention.o:   o dense output.dense out_proj c_proj proj wo Wo output
"""),
    "mlp": table(_MLP + "router: gate"),
    "shared": table(_MLP + "mlp.gate: gate\nmlp.up: up\nmlp.down: down"),
    "moe": table("router: gate\nexpert.gate_up: input_linear\nexpert.down: output_linear"),
    "expert": table(_MLP + "mlp.gate: gate\nmlp.up: up\nmlp.down: down"),
    "mixer": table("""
    mixer.in:   in_proj in_proj_qkvz in_proj_ba in_proj_qkv in_proj_z in_proj_a in_proj_b
    mixer.conv: conv conv1d
    mixer.out:  out_proj
    router:     gate
"""),
    "head": table("head: decoder\nhead.transform: dense\nhead.classifier: out_proj"),
    "": {},
}

# The last component of most names says only which parameter of its module a tensor is.
PARAMETERS = frozenset(
    table("""
    plain:     weight bias gamma beta
    quantised: weight_scale weight_scale_inv weight_scale_2 weight_packed weight_shape weight_zero_point
               input_scale qweight qzeros scales g_idx
""")
)
PARAMETER_ENDING = re.compile(r"_(weight|bias|blocks|scales)$")

NORM = re.compile(r"norm|(^|_)(ln|bn)\d*(_|$)", re.IGNORECASE)
INNER_NORM = re.compile(r"^(q|k|v|kv|qk|query|key|inner|sub)_|_(q|k)$")
SCALE = re.compile(r"layer_?scale|^(gamma|lambda)(_?\d)?$|^ls_?\d$")

# Precision here matters more than bytes: tiny tensors whose users keep them in float32.
KEEP_DTYPE = frozenset({"A_log", "D", "dt_bias", "e_score_correction_bias"})

# A component before a number that is a layer for certain.
CONTAINER = re.compile(r"(^|_)(layers?|blocks?|h|resblocks|stages?|layer_groups)$")

# A tensor outside every layer comes before the layers if a component of its name says so.
BEFORE = re.compile(
    r"embed|patch|stem|^pre_la?yr?|^pre_ln|^project_in$|^feature_(extractor|projection)$"
    r"|^conv(1|2|_in)$|^(time|label)_|^shared$|^w[tp]e$"
)

# Components found only in a layer that predicts further tokens (MTP).
MTP = frozenset({"eh_proj", "enorm", "hnorm"})
