"""Tiny models, built by transformers and saved, for the names that are really on disk."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergetool.anatomy import Anatomy, anatomy

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": 256}
MOE = {**LLAMA, "moe_intermediate_size": 16}
MLA = {
    **MOE,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 256}

# name → class and config of transformers, and the arguments of the config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "head_dim": 8}),
    "phi": ("PhiForCausalLM", "PhiConfig", LLAMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA),
    "cohere": ("CohereForCausalLM", "CohereConfig", LLAMA),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", LLAMA),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**LLAMA, "head_dim": 8}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt2_bare": ("GPT2Model", "GPT2Config", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", ENCODER),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 256}),
    "falcon": ("FalconForCausalLM", "FalconConfig", ENCODER),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 16} | {k: v for k, v in ENCODER.items() if k != "intermediate_size"},
    ),
    "bert": ("BertModel", "BertConfig", ENCODER),
    "bert_pretraining": ("BertForPreTraining", "BertConfig", ENCODER),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
    "roberta_classifier": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", DISTIL),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**ENCODER, "embedding_size": 16}),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", ENCODER),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**ENCODER, "embedding_size": 16}),
    "deberta": ("DebertaV2ForMaskedLM", "DebertaV2Config", ENCODER),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {**ENCODER, "cls_token_id": 1, "sep_token_id": 2}),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION),
    "dinov2": ("Dinov2Model", "Dinov2Config", {k: v for k, v in VISION.items() if k != "intermediate_size"}),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 16}),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**ENCODER, "projection_size": 32}, "vision_config": VISION},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_gated": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SEQ2SEQ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MOE, "num_experts": 4, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**LLAMA, "num_experts": 4}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**LLAMA, "num_local_experts": 4}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**LLAMA, "head_dim": 8, "num_local_experts": 4}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**MLA, "q_lora_rank": None}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**MLA, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 256}),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 256, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**MOE, **LINEAR, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16},
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**LLAMA, "layer_types": ["conv", "conv", "full_attention"]}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 256}),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": {**LLAMA, "head_dim": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
}


@dataclass(frozen=True)
class OnDisk:
    """A saved model, and what transformers holds to be tied in it."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]

    @property
    def anatomy(self) -> Anatomy:
        return anatomy(self.config, self.shapes)


@cache
def on_disk(name: str) -> OnDisk:
    """Build and save one of the models; read the header and the config back."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_class, config_class, arguments = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        raw = Path(folder, "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    shapes = {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    return OnDisk(config, shapes, dict(getattr(model, "all_tied_weights_keys", None) or {}))
