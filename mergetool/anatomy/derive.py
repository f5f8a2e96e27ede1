"""From a config and the names and shapes on disk to the part that every tensor plays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

from mergetool.anatomy.families import Family, family_of
from mergetool.anatomy.names import Template, has_container, read_template, template_of
from mergetool.anatomy.parts import Anatomy, Part
from mergetool.anatomy.ties import tied_names

Shape = tuple[int, ...]


class _Place(NamedTuple):
    """Where a name stands, before the whole model is known."""

    template: Template
    stack: str
    layer: int | None
    expert: int | None


def anatomy(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Anatomy:
    """Derive the part of every tensor and the tied names.

    Args:
        config: the model's ``config.json``; may be empty.
        shapes: name → shape of every tensor, as on disk.
    """
    family, tied_by_default = family_of(config)
    places = _places(shapes, family)
    layers = _layer_counts(places, config)
    stacks = _loose_stacks(places, layers)
    smallest = _smallest_vocabulary(config, places, shapes)
    parts = {
        name: _part(place, stacks.get(name, place.stack), layers, _vocabulary_axis(place, shapes[name], smallest))
        for name, place in places.items()
    }
    tied = tied_names(config, family, tied_by_default, shapes)
    return Anatomy(family.name, MappingProxyType(parts), MappingProxyType(tied))


def _places(shapes: Mapping[str, Shape], family: Family) -> dict[str, _Place]:
    """Read every name; names that differ only in numbers share one template."""
    keys = [template_of(name) for name in shapes]
    distinct = set(keys)
    # Only a model without any named container counts the members of a bare sequence as layers: elsewhere
    # ``merger.mlp.0.weight`` is the first half of a small MLP.
    sequence = not any(has_container(key) for key in distinct)
    templates = {key: read_template(key, family, sequence) for key in distinct}
    return {name: _place(name, templates[key]) for name, key in zip(shapes, keys, strict=True)}


def _place(name: str, template: Template) -> _Place:
    layer_at, expert_at = template.layer_at, template.expert_at
    if layer_at is None and expert_at is None:
        return _Place(template, "", None, None)
    words = name.split(".")
    expert = None if expert_at is None else int(words[expert_at].removeprefix("expert_"))
    if layer_at is None:
        return _Place(template, "", None, expert)
    return _Place(template, ".".join(words[:layer_at]), int(words[layer_at]), expert)


def _layer_counts(places: Mapping[str, _Place], config: Mapping[str, Any]) -> dict[str, int]:
    """How many layers each stack has by its names, without those that predict further tokens."""
    counts: dict[str, int] = {}
    further: set[tuple[str, int]] = set()
    for place in places.values():
        if place.layer is None:
            continue
        if place.layer >= counts.get(place.stack, 0):
            counts[place.stack] = place.layer + 1
        if place.template.predicts_further:
            further.add((place.stack, place.layer))
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    hidden, extra = (text.get(key, config.get(key)) for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    for stack, count in counts.items():
        if isinstance(hidden, int) and isinstance(extra, int) and count == hidden + extra:
            counts[stack] = count = max(hidden, 1)
        while count > 1 and (stack, count - 1) in further:
            count -= 1
        counts[stack] = count
    return counts


def _loose_stacks(places: Mapping[str, _Place], layers: Mapping[str, int]) -> dict[str, str]:
    """The stack of every tensor outside the layers: the one whose prefix it shares the most of."""
    loose = {name: place.template.role for name, place in places.items() if place.layer is None}
    if len(layers) < 2:
        return dict.fromkeys(loose, next(iter(layers), ""))
    homes = _homes(layers)
    result = {name: next((homes[prefix] for prefix in _prefixes(name) if prefix in homes), "") for name in loose}
    # A head seldom shares a prefix with its layers. It has the same as the embeddings, or else the decoder's.
    home = {stack for name, stack in result.items() if stack and loose[name] == "embedding"}
    if len(home) != 1:
        home = {stack for stack in layers if "decoder" in stack}
    if len(home) == 1:
        heads = (name for name, stack in result.items() if not stack and loose[name] == "head")
        result.update(dict.fromkeys(heads, home.pop()))
    return result


def _homes(stacks: Iterable[str]) -> dict[str, str]:
    """The stack of the tensors under a prefix: the only one there, or the only one directly below it."""
    under: dict[str, list[str]] = {}
    for stack in stacks:
        for prefix in _prefixes(stack):
            under.setdefault(prefix, []).append(stack)
    homes = {}
    for prefix, found in under.items():
        if len(found) > 1:
            found = [stack for stack in found if stack.rpartition(".")[0] == prefix]
        homes[prefix] = found[0] if len(found) == 1 else ""
    return homes


def _prefixes(name: str) -> Iterator[str]:
    """The name itself and what is left of it without its last components, but not nothing."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _smallest_vocabulary(config: Mapping[str, Any], places: Mapping[str, _Place], shapes: Mapping[str, Shape]) -> int:
    """Half the smallest vocabulary of the config, or else of the largest embedding; fewer rows are none."""
    stated = list(_vocabulary_sizes(config))
    if stated:
        return min(stated) // 2
    rows = (shapes[name][:1] for name, place in places.items() if place.template.role == "embedding")
    return max(chain.from_iterable(rows), default=0) // 2


def _vocabulary_sizes(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if key == "vocab_size" and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping) and key.endswith("_config"):
            yield from _vocabulary_sizes(value)


def _vocabulary_axis(place: _Place, shape: Shape, smallest: int) -> int | None:
    if place.template.role not in ("embedding", "head") or not shape:
        return None
    axis = 1 if len(shape) == 2 and shape[0] == 1 else 0  # BART's final_logits_bias is [1, vocabulary]
    return axis if shape[axis] > smallest else None


def _part(place: _Place, stack: str, layers: Mapping[str, int], axis: int | None) -> Part:
    template, layer = place.template, place.layer
    count = layers.get(stack, 0)
    depth = template.loose_depth if layer is None else _depth(layer, count)
    return Part(template.role, stack, layer, count, depth, place.expert, axis, template.keep_dtype)


def _depth(layer: int, layers: int) -> float:
    """A stack of one layer is all depth 1, as mergekit has it; layers beyond the count are too."""
    return min(layer / (layers - 1), 1.0) if layers > 1 else 1.0
