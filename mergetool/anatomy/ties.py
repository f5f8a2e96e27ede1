"""Which names are one and the same weight, so that it is merged once and written under its own name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from mergetool.anatomy.families import Family, Tie

# Classes without an output matrix over the vocabulary.
_HEADLESS = re.compile(
    r"For(Sequence|Token|Image|Audio)Classification$|For(QuestionAnswering|MultipleChoice)$|EncoderModel$"
    r"|(?<!LMHead)(?<!Heads)(?<!Chat)Model$"
)
_WITH_HEAD = re.compile(r"For(CausalLM|ConditionalGeneration)$|LMHead(Model)?$")


def tied_names(
    config: Mapping[str, Any], family: Family, default: bool | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Map every absent or duplicate name of a tied weight to the name on disk that holds it.

    Args:
        config: the model's ``config.json``.
        family: where the tied names are known from.
        default: whether the family ties embeddings and head where the config does not say.
        shapes: the tensors on disk; names whose shapes differ are no one weight.
    """
    stated = _stated(config)
    # Where the outer and the inner config of a composed model disagree, nobody knows.
    tied = stated.pop() if len(stated) == 1 else default if not stated else None
    result: dict[str, str] = {}
    settled: set[str] = set()
    for tie in _on_disk(family.ties, shapes):
        if settled.isdisjoint(tie.heads):
            settled.update(tie.heads)
            result.update(_resolve(tie, config, tied, shapes))
    return {name: holder for name, holder in result.items() if shapes.get(name, shapes[holder]) == shapes[holder]}


def _stated(config: Mapping[str, Any]) -> set[bool]:
    """What the config and the config of its language model say."""
    parts = (config, config.get("text_config"), config.get("llm_config"))
    said = (part.get("tie_word_embeddings") for part in parts if isinstance(part, Mapping))
    return {value for value in said if isinstance(value, bool)}


def _on_disk(ties: tuple[Tie, ...], names: Collection[str]) -> list[Tie]:
    """The ties with an embedding on disk; failing that, those with a head, which then holds the weight."""
    found = [tie for tie in ties if any(name in names for name in tie.embeddings)]
    return found or [tie for tie in ties if any(name in names for name in tie.heads)][:1]


def _resolve(tie: Tie, config: Mapping[str, Any], tied: bool | None, names: Collection[str]) -> dict[str, str]:
    group = [name for name in tie.embeddings if name in names or _belongs(name, names)]
    heads = [name for name in tie.heads if _is_tied(name, tie.witness, config, tied, names)]
    group += heads
    if not any(name in names for name in tie.embeddings):
        if not heads:
            return {}
        group = [*tie.embeddings[:1], *heads]
    holder = next((name for name in group if name in names), None)
    return {name: holder for name in group if name != holder} if holder else {}


def _belongs(name: str, names: Collection[str]) -> bool:
    """Whether the model has the tower that an absent name would stand in."""
    tower = name.rsplit(".", 2)[0] + "."
    return any(other.startswith(tower) for other in names)


def _is_tied(head: str, witness: str, config: Mapping[str, Any], tied: bool | None, names: Collection[str]) -> bool:
    classes = [str(name) for name in config.get("architectures") or ()]
    if tied is None:
        # Nobody says: a head on disk may differ from the embeddings, and is then its own weight.
        return head not in names and any(_WITH_HEAD.search(name) for name in classes)
    if not tied or head in names:
        return tied
    if witness:
        return any(name.startswith(witness) for name in names)
    return not classes or not all(_HEADLESS.search(name) for name in classes)
