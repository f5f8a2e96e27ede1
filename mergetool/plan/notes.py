"""What a user should know about a recipe and its models although nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mergetool.plan.work import Source
from mergetool.recipe import Recipe

_TEMPLATE = "chat_template.jinja"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
"""Where tokens get their numbers; of a model's files the first counts."""


def notes(recipe: Recipe, sources: Sequence[Source], lender: int) -> tuple[str, ...]:
    """The notes of a plan.

    Args:
        recipe: the recipe.
        sources: its opened models.
        lender: which of them lends the output its config and other files.
    """
    return (*_architecture(sources), *_base(recipe), *_template(recipe, sources, lender), *_tokenizers(sources))


def _architecture(sources: Sequence[Source]) -> Iterator[str]:
    if "generic" in {source.anatomy.family for source in sources}:
        yield "the architecture is not a listed one: layers and parts are inferred from names"
    types = {str(s.checkpoint.config["model_type"]) for s in sources if "model_type" in s.checkpoint.config}
    if len(types) > 1:
        yield f"the sources' configs name different model types ({', '.join(sorted(types))})"


def _base(recipe: Recipe) -> Iterator[str]:
    """A base among the models is nobody's delta, so what it sets for itself has no effect."""
    methods = [recipe.method(), *(recipe.method(rule) for rule in recipe.rules if not (rule.keep or rule.drop))]
    for model in recipe.models:
        merged = any(model.reference in recipe.merged_by(method) for method in methods)
        if model.reference == recipe.base_model and model.parameters and not merged:
            names = ", ".join(f"`{name}`" for name in model.parameters)
            yield f"the base is not merged with itself: what `models` sets for it has no effect ({names})"


def _template(recipe: Recipe, sources: Sequence[Source], lender: int) -> Iterator[str]:
    having = [source.label for source in sources if _TEMPLATE in source.checkpoint.files]
    asked = recipe.tokenizer_source not in (None, "base")
    if having and _TEMPLATE not in sources[lender].checkpoint.files and not asked:
        yield f"{having[0]} has a chat template and the output will not: see `tokenizer_source`"


def _tokenizers(sources: Sequence[Source]) -> Iterator[str]:
    """Sources whose tokens have other numbers: their rows of the embeddings do not belong together.

    Only models on this disk are compared, for nothing is downloaded to make a note.
    """
    held: dict[str, dict[str, bytes]] = {}
    for source in sources:
        name = next((name for name in _VOCABULARIES if name in source.checkpoint.files), None)
        content = source.checkpoint.companion(name) if name is not None and source.checkpoint.repo is None else None
        if name is not None and content is not None:
            held.setdefault(name, {})[source.label] = content
    for name, contents in held.items():
        distinct = set(contents.values())
        tokens = {raw: _tokens(raw) for raw in distinct} if len(distinct) > 1 else dict.fromkeys(distinct)
        first, *others = contents
        other = next((label for label in others if tokens[contents[label]] != tokens[contents[first]]), None)
        if other is not None:
            what = f"the tokenizers of {first} and {other} number their tokens differently ({name})"
            yield f"{what}, so rows of the embeddings that mean different tokens are merged"


def _tokens(raw: bytes) -> object:
    """Which token has which number, of a ``tokenizer.json``; of what cannot be taken apart, the bytes."""
    try:
        found: Any = json.loads(raw)
        return found["model"]["vocab"], [(token["id"], token["content"]) for token in found["added_tokens"]]
    except (ValueError, TypeError, LookupError):
        return raw
