"""Tiny models of transformers, saved and opened again, and batches for them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from mergetool.checkpoint.checkpoint import open_checkpoint
from mergetool.execute.forward.model import open_model
from mergetool.execute.forward.weights import open_weights

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 64}

# name → class and config of transformers, the arguments of the config and of saving.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, {}),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA, {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}, {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, {}),
    "bert": ("BertModel", "BertConfig", ENCODER, {}),
    "bert_pretraining": ("BertForPreTraining", "BertConfig", ENCODER, {}),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", {**ENCODER, "num_labels": 3}, {}),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}, {}),
    "mixtral_fused": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4},
        {"save_original_format": False},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}, {}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        {},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, {}),
    "albert": ("AlbertModel", "AlbertConfig", {**ENCODER, "embedding_size": 8}, {}),
}


def build(name):
    """One of the models as transformers makes it, with weights large enough to tell apart."""
    import transformers

    model_class, config_class, arguments, _ = MODELS[name]
    torch.manual_seed(7)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def save(name, folder):
    """Save one of the models; transformers' own model comes back too."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = build(name)
    model.save_pretrained(folder, **MODELS[name][3])
    return model


@contextlib.contextmanager
def opened(folder: Path, adapter=None):
    """A saved model, ready to be run."""
    checkpoint = open_checkpoint(str(folder))
    with open_weights(checkpoint) as weights:
        yield open_model(checkpoint.config, weights, "tiny", adapter)


def batches(name, padded=True):
    """Two batches of different lengths, padded unless the model has a decoder of its own."""
    random = torch.Generator().manual_seed(3)
    if name == "vit":
        return [{"pixel_values": torch.randn(2, 3, 8, 8, generator=random)} for _ in range(2)]
    made = []
    for length in (7, 9):
        ids = torch.randint(3, 64, (2, length), generator=random)
        mask = torch.ones_like(ids)
        if padded and name != "t5":
            mask[0, 5:] = 0
            ids[0, 5:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if name == "t5":
            batch["decoder_input_ids"] = torch.randint(3, 64, (2, 4), generator=random)
        made.append(batch)
    return made
