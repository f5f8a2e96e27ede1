"""What models take in memory while they are looked at whole: as they are stored, in float32, a layer at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import prod

from mergetool.anatomy import symmetries
from mergetool.errors import PlanError
from mergetool.facts.dam import Granularity, slots
from mergetool.plan.work import Source
from mergetool.recipe.data import Align

SMALL = 100_000_000
"""Bytes that a training takes for its code, a tokenizer, and small blocks that the C library keeps: measured."""


def weights(source: Source) -> int:
    """Bytes of a model on disk."""
    return sum(tensor.nbytes for tensor in source.checkpoint.tensors.values())


def floats(source: Source) -> int:
    """Bytes of a model in float32."""
    return sum(4 * tensor.size for tensor in source.checkpoint.tensors.values())


def largest(source: Source) -> int:
    """Bytes of a model's largest tensor in float32."""
    return max((4 * tensor.size for tensor in source.checkpoint.tensors.values()), default=0)


def layer(source: Source) -> int:
    """Bytes in float32 of a model's largest layer, or of what lies outside all layers."""
    return max(map(_sized, _layers(source)), default=0)


def grams(source: Source) -> int:
    """Bytes of a layer in float32 with a Gram matrix for each of its matrices, in float64 and in float32."""
    return max(
        (_sized(block) + sum(12 * prod(s[:-2]) * s[-1] ** 2 for s in block if len(s) > 1) for block in _blocks(source)),
        default=layer(source),
    )


def matched(source: Source, align: Align) -> int:
    """Bytes that matching takes: a layer of both models and the scores of the largest group, some copies of them.

    The assignment wants scores in float64, and correlations are summed in it with what is outside the layers loaded.
    How many bytes that is for each of them is measured by ``python -m tests.bench.matching``.
    """
    shapes = {name: tensor.shape for name, tensor in source.checkpoint.tensors.items()}
    try:
        groups = symmetries(source.anatomy, source.checkpoint.config, shapes, align.groups)
    except PlanError:  # told when it is matched
        return 2 * layer(source)
    scores = max((group.size for group in groups), default=0) ** 2
    if align.method == "weight_matching":
        return 2 * layer(source) + 24 * scores
    return 2 * sum(sorted(map(_sized, _layers(source)))[-2:]) + 34 * scores


def coefficients(source: Source, granularity: Granularity) -> int:
    """How many coefficients training gives a source."""
    shapes = {name: tensor.shape for name, tensor in source.checkpoint.tensors.items()}
    drawn = slots(source.anatomy.parts, shapes, granularity=granularity)
    return sum(prod(each.coefficients(1)) for slot in drawn for each in slot.sets)


def _sized(block: Iterable[tuple[int, ...]]) -> int:
    return sum(4 * prod(shape) for shape in block)


def _layers(source: Source) -> list[list[tuple[int, ...]]]:
    """The shapes of the tensors of each layer, those outside all layers together."""
    return [*_blocks(source), [s for key, s in _shapes(source) if key[1] is None]]


def _blocks(source: Source) -> list[list[tuple[int, ...]]]:
    found: dict[tuple[str | None, int | None], list[tuple[int, ...]]] = defaultdict(list)
    for key, shape in _shapes(source):
        if key[1] is not None:
            found[key].append(shape)
    return list(found.values())


def _shapes(source: Source) -> Iterator[tuple[tuple[str | None, int | None], tuple[int, ...]]]:
    for name, tensor in source.checkpoint.tensors.items():
        part = source.anatomy.parts[name]
        yield (part.stack, part.layer), tensor.shape
