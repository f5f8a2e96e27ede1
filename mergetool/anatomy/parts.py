"""Parts: what each tensor is in its model, and the anatomy that holds them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """What one tensor is in its model.

    Attributes:
        role: one of :data:`mergetool.anatomy.ROLES`.
        stack: the prefix of the layers that the tensor belongs to, such as ``model.layers``;
            empty where it belongs to no stack or stands between several.
        layer: the number of its layer; ``None`` outside the layers.
        layers: how many layers the stack has, without those that predict further tokens (MTP); a layer
            of that kind has a number from there on. 0 where there is no stack.
        depth: 0 for what comes before the layers and for the first of them, 1 for the last and what comes
            after.
        expert: the number of its expert; ``None`` where a tensor holds no expert or all of them.
        vocabulary_axis: the axis that runs over the vocabulary, if any.
        keep_dtype: whether the tensor is best left in the dtype it has on disk.
    """

    role: str
    stack: str
    layer: int | None
    layers: int
    depth: float
    expert: int | None
    vocabulary_axis: int | None
    keep_dtype: bool


@dataclass(frozen=True)
class Anatomy:
    """What every tensor of a checkpoint is.

    Attributes:
        family: the table of names that was used, ``generic`` for an unlisted model.
        parts: a part for every name on disk, in the same order.
        tied: absent or duplicate name → the name on disk that holds the weight.
    """

    family: str
    parts: Mapping[str, Part]
    tied: Mapping[str, str]
