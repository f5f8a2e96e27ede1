"""Families of models as data: model types, what only their names mean, and which names are tied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tie:
    """Names of one and the same weight.

    Attributes:
        embeddings: names tied whatever the config says; the first on disk holds the weight.
        heads: names tied too where the config says ``tie_word_embeddings``.
        witness: a prefix found on disk if the heads exist; empty where only the config can tell.
    """

    embeddings: tuple[str, ...]
    heads: tuple[str, ...] = ()
    witness: str = ""


@dataclass(frozen=True)
class Family:
    """Model types that spell their tensors alike.

    Attributes:
        name: what the family is called.
        tied: model types whose embeddings and head are one weight unless the config denies it.
        untied: model types whose embeddings and head are two weights unless the config says otherwise.
        roles: suffix of a name without numbers and parameter → role, where the common words would miss it.
        ties: which names may be one weight; the first whose weight is on disk counts.
        after: last components that look as if they came before the layers, and come after them.
    """

    name: str
    tied: str = ""
    untied: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    after: frozenset[str] = frozenset()


def _encoder_ties(name: str, head: str, witness: str, bias: str = "") -> tuple[Tie, ...]:
    """Ties of a masked language model saved with or without the name of its encoder."""
    holders = (f"{name}.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight")
    ties = tuple(Tie((holder,), (head,), witness) for holder in holders)
    return (*ties, Tie((bias, head.removesuffix("weight") + "bias"))) if bias else ties


def _shared_ties(prefix: str) -> Tie:
    towers = tuple(f"{prefix}{tower}.embed_tokens.weight" for tower in ("encoder", "decoder"))
    return Tie((f"{prefix}shared.weight", *towers), ("lm_head.weight",))


DECODER_TIES = (
    Tie(("model.embed_tokens.weight",), ("lm_head.weight",)),
    Tie(("model.language_model.embed_tokens.weight",), ("lm_head.weight",)),
    Tie(("language_model.model.embed_tokens.weight",), ("language_model.lm_head.weight",)),
    Tie(("model.text_model.embed_tokens.weight",), ("lm_head.weight",)),
    Tie(("model.decoder.embed_tokens.weight",), ("lm_head.weight",)),
    Tie(("transformer.wte.weight",), ("lm_head.weight",)),
    Tie(("transformer.word_embeddings.weight",), ("lm_head.weight",)),
    Tie(("backbone.embeddings.weight",), ("lm_head.weight",)),
    Tie(("gpt_neox.embed_in.weight",), ("embed_out.weight",)),
    Tie(("embed_tokens.weight",), ("lm_head.weight",)),
    Tie(("wte.weight",), ("lm_head.weight",)),
    Tie(("word_embeddings.weight",), ("lm_head.weight",)),
)

GENERIC = Family("generic", ties=DECODER_TIES)

FAMILIES = (
    Family(
        "llama",
        tied="gemma gemma2 gemma3_text gemma3n_text gemma4_text cohere cohere2 smollm3 starcoder2 minicpm3 ernie4_5",
        untied="llama mistral ministral qwen2 qwen3 phi phi3 olmo olmo2 olmo3 stablelm glm glm4 granite "
        "arcee apertus exaone4 helium nemotron seed_oss bitnet persimmon internlm2 internlm3 baichuan",
        ties=DECODER_TIES,
    ),
    Family(
        "moe",
        tied="ernie4_5_moe cohere2_moe jetmoe",
        untied="mixtral qwen2_moe qwen3_moe olmoe phimoe granitemoe granitemoeshared granitemoehybrid "
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe afmoe dots1 gpt_oss llama4 llama4_text dbrx minimax "
        "minimax_m2 hunyuan_v1_moe flex_olmo longcat_flash",
        ties=DECODER_TIES,
    ),
    Family(
        "gpt2",
        tied="gpt2 gpt-sw3 gpt_bigcode gpt_neo bloom falcon opt mpt",
        untied="gpt_neox gptj codegen",
        roles={"mlp.c_fc2": "mlp.gate"},
        ties=DECODER_TIES,
    ),
    Family("qwen", untied="qwen", roles={"mlp.w1": "mlp.up", "mlp.w2": "mlp.gate"}, ties=DECODER_TIES),
    Family(
        "hybrid",
        tied="mamba falcon_mamba recurrent_gemma zamba zamba2 lfm2 lfm2_moe",
        untied="mamba2 jamba bamba falcon_h1 qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text "
        "nemotron_h kimi_linear olmo_hybrid",
        ties=DECODER_TIES,
        after=frozenset({"embedding_norm"}),
    ),
    Family(
        "rwkv",
        untied="rwkv",
        roles={
            "attention.receptance": "attention.q",
            "feed_forward.receptance": "mlp.gate",
            "feed_forward.key": "mlp.up",
            "feed_forward.value": "mlp.down",
            **{
                f"{block}.time_{what}": "mixer.state"
                for block in ("attention", "feed_forward")
                for what in ("decay", "first", "mix_key", "mix_value", "mix_receptance")
            },
        },
    ),
    Family(
        "bert",
        tied="bert megatron-bert ernie nomic_bert layoutlm",
        ties=_encoder_ties("bert", "cls.predictions.decoder.weight", "cls.predictions.", "cls.predictions.bias"),
    ),
    Family(
        "deberta",
        tied="deberta deberta-v2",
        roles={"attention.self.in_proj": "attention.qkv", "attention.self.pos_proj": "attention.k"},
        ties=_encoder_ties("deberta", "cls.predictions.decoder.weight", "cls.predictions.", "cls.predictions.bias"),
    ),
    Family(
        "roberta",
        tied="roberta xlm-roberta camembert xlm-roberta-xl data2vec-text",
        ties=_encoder_ties("roberta", "lm_head.decoder.weight", "lm_head.", "lm_head.bias"),
    ),
    Family(
        "mpnet",
        tied="mpnet",
        ties=_encoder_ties("mpnet", "lm_head.decoder.weight", "lm_head.", "lm_head.bias"),
    ),
    Family(
        "distilbert",
        tied="distilbert",
        ties=_encoder_ties("distilbert", "vocab_projector.weight", "vocab_projector."),
    ),
    Family(
        "albert",
        tied="albert",
        ties=_encoder_ties("albert", "predictions.decoder.weight", "predictions.", "predictions.bias"),
    ),
    Family(
        "electra",
        tied="electra",
        ties=_encoder_ties("electra", "generator_lm_head.weight", "generator_"),
    ),
    Family(
        "modernbert",
        tied="modernbert",
        roles={"decoder": "head", "head.dense": "head.transform"},
        ties=(Tie(("model.embeddings.tok_embeddings.weight",), ("decoder.weight",), "decoder."),),
    ),
    Family("vit", untied="vit deit dinov2 dinov2_with_registers beit vit_mae vit_msn"),
    Family(
        "clip",
        untied="clip clip_text_model clip_vision_model siglip siglip2 siglip_text_model siglip_vision_model "
        "chinese_clip",
        roles={"text_model.head": "projector"},
    ),
    Family(
        "vlm",
        tied="gemma3 gemma3n gemma4 paligemma mistral3 aya_vision cohere2_vision internvl got_ocr2",
        untied="llava llava_next llava_onevision vipllava qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe idefics2 "
        "idefics3 smolvlm glm4v glm4v_moe video_llava",
        roles={"mm_input_projection": "projector"},
        ties=DECODER_TIES,
    ),
    Family("t5", tied="t5 mt5 umt5 longt5 switch_transformers pop2piano udop", ties=(_shared_ties(""),)),
    Family(
        "bart",
        tied="bart mbart pegasus marian m2m_100 blenderbot blenderbot-small plbart led",
        ties=(_shared_ties("model."), _shared_ties("")),
    ),
    Family(
        "whisper",
        tied="whisper",
        roles={"encoder.conv1": "embedding.patch", "encoder.conv2": "embedding.patch"},
        ties=(Tie(("model.decoder.embed_tokens.weight",), ("proj_out.weight",)),),
    ),
)

_BY_TYPE = {
    model_type: (family, default)
    for family in FAMILIES
    for default, types in ((True, family.tied), (False, family.untied))
    for model_type in types.split()
}


def family_of(config: Mapping[str, Any]) -> tuple[Family, bool | None]:
    """The family of a config and whether its head is tied by default; ``None`` where nobody knows."""
    nested = [config[key] for key in ("text_config", "llm_config", "language_config") if key in config]
    for part in (config, *nested):
        if isinstance(part, Mapping) and str(part.get("model_type")) in _BY_TYPE:
            return _BY_TYPE[str(part["model_type"])]
    return GENERIC, None
