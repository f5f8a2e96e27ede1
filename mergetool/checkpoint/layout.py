"""Which files of a model folder hold its weights and which belong beside them, told from the names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from mergetool.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Weights that are not the model, or are the model a second time in its vendor's own layout.
_NOT_THE_MODEL = ("adapter_model*", "consolidated*", "optimizer*", "scheduler*", "training_args*")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# What a model folder needs besides its weights, in its top folder and in the named sub-folders.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "vocab_*",
    "merges.txt",
    "normalizer.json",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
    "tokenization_*.py",
)
"""What travels with a tokenizer; chat templates too, which speak in its special tokens."""
_LEGAL = ("license*", "licence*", "notice*")
_SUBFOLDERS = ("additional_chat_templates", "[0-9]_*")
_LEFT_OUT = (
    "*.index.json",
    "adapter_config.json",  # transformers would load the adapter on top of the merged model
    "trainer_state.json",
    "readme*",
)


def weight_file(names: Iterable[str], where: str) -> str:
    """The one file to start from: a ``.safetensors`` file, or the ``.index.json`` that lists the shards.

    ``model.safetensors`` comes before its index, as in transformers. Where there is neither, a single other
    pair of that kind is taken: ``diffusion_pytorch_model.safetensors``, ``model.fp16.safetensors``.

    Args:
        names: the files of the folder, relative, with ``/``.
        where: the model, for messages.

    Raises:
        CheckpointError: there are no weights that can be read, or several models.
    """
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    for default in (_SINGLE, _INDEX):
        if default in top:
            return default
    candidates = [
        name
        for name in top
        if name.endswith((".safetensors", ".safetensors.index.json")) and not _matches(name, _NOT_THE_MODEL)
    ]
    indexes = [name for name in candidates if name.endswith(".index.json")]
    single = [name for name in candidates if name.endswith(".safetensors") and not _SHARD.fullmatch(name)]
    # An index stands for its shards, and a single file of the same stem comes before it.
    starts = single + [name for name in indexes if name.removesuffix(".index.json") not in single]
    if len(starts) == 1:
        return starts[0]
    if len(starts) > 1:
        raise CheckpointError(
            f"holds several models: {', '.join(starts)}", where, "name the file itself, with its folder"
        )
    if candidates:
        raise CheckpointError(f"holds shards ({candidates[0]} …) but no {_INDEX}", where, "download the missing index")
    raise _no_weights(names, top, where)


def _no_weights(names: list[str], top: list[str], where: str) -> CheckpointError:
    """The error that says what there is instead of safetensors weights."""
    if any(_matches(name, ("adapter_model*", "adapter_config.json")) for name in top):
        return CheckpointError(
            "is a LoRA adapter, not a model",
            where,
            "merge it into its base first (peft: `merge_and_unload()`) and name the saved model here",
        )
    if any(_matches(name, ("consolidated*.safetensors",)) for name in top):
        return CheckpointError(
            "holds its weights only in the vendor's own layout (consolidated*.safetensors)",
            where,
            "use the transformers release of this model, or name the file itself",
        )
    if any(name.endswith(".gguf") for name in top):
        return CheckpointError(
            "is a GGUF model, quantised for inference",
            where,
            "use the 16-bit safetensors release of this model",
        )
    pickles = [name for name in top if _matches(name, _PICKLES) and not _matches(name, _NOT_THE_MODEL)]
    if pickles:
        return CheckpointError(
            f"holds its weights as a pickle ({pickles[0]}), which may run code when it is loaded",
            where,
            "convert it once: load it with transformers (4.x) and `save_pretrained(folder, "
            "safe_serialization=True)`, or use a revision of the repo that has safetensors",
        )
    folders = sorted({name.rsplit("/", 1)[0] for name in names if "/" in name and name.endswith(".safetensors")})
    if folders:
        return CheckpointError(
            f"holds no weights itself, but these folders in it do: {', '.join(folders[:8])}",
            where,
            "name one of them",
        )
    return CheckpointError(
        "holds no weights", where, f"a model folder has {_SINGLE}, or {_INDEX} and the shards it lists"
    )


def companions(names: Iterable[str]) -> tuple[str, ...]:
    """The files worth carrying into a merged model: configs, tokenizer, templates, code, licences; sorted."""
    return tuple(sorted(name for name in names if _is_companion(name)))


def is_tokenizer(name: str) -> bool:
    """Whether a file of a model folder belongs to its tokenizer."""
    return _matches(name, _TOKENIZER)


def _is_companion(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if file.startswith(".") or _matches(file.lower(), _LEFT_OUT):
        return False
    if not folder:
        return _matches(file, _COMPANIONS) or _matches(file.lower(), _LEGAL)
    return _matches(folder, _SUBFOLDERS) and "/" not in folder and _matches(file, _COMPANIONS)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
