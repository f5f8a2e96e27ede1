"""DAM's coefficients: which a weight has, how they are laid out, and the merge that they make.

Of N sources every weight becomes ``W = sum_i W_i diag(c_i)`` (form ``full``, equation 1 of arXiv:2410.08371) or
``W = W_0 + sum_i (W_i - W_0) diag(c_i)`` (form ``delta``), with one coefficient for each column, row, tensor or layer,
or for each entry the sum of its column's and its row's: ``W[o, j] = W_0[o, j] + sum_i (c_i[j] + r_i[o]) D_i[o, j]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import Part, matches_role
from mergetool.errors import Problem, ShapeMismatch

Granularity = Literal["row+column", "column", "row", "tensor", "layer"]
Form = Literal["full", "delta"]
Kind = Literal["linear", "embedding", "norm"]

GRANULARITIES: tuple[Granularity, ...] = ("row+column", "column", "row", "tensor", "layer")
FORMS: tuple[Form, ...] = ("full", "delta")
KINDS: tuple[Kind, ...] = ("linear", "embedding", "norm")

ROWS = ":rows"
"""Ends the name of the coefficients of rows that are added to those of columns, which have the weight's name."""

_LINEAR = ("attention", "mlp", "expert", "router", "mixer", "projector", "head", "embedding.patch")
_FIXED = ("buffer", "mixer.state", "mixer.step", "attention.bias")


@dataclass(frozen=True, slots=True)
class Slot:
    """The coefficients of one weight.

    Attributes:
        name: the weight's name on disk.
        shape: the weight's shape.
        axes: the axes along which coefficients differ, ascending: ``(1,)`` for the columns of a matrix.
        key: what they are trained under; weights with the same key share them.
        trained: whether they are trained or stay as they begin.
        rows: the coefficients of rows that are added to these, if the weight has both.
        added: whether these are the ones that are added: they begin at 0.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    key: str
    trained: bool
    rows: Slot | None = None
    added: bool = False

    @property
    def sets(self) -> tuple[Slot, ...]:
        """These, and those that are added to them."""
        return (self,) if self.rows is None else (self, self.rows)

    @property
    def label(self) -> str:
        """What they are kept under: the weight's name, for rows that are added with :data:`ROWS` at its end."""
        return f"{self.name}{ROWS}" if self.added else self.name

    def untrained(self) -> Slot:
        """The slot with coefficients that stay as they begin; rows would add nothing."""
        return replace(self, trained=False, rows=None)

    def coefficients(self, sources: int) -> tuple[int, ...]:
        """The shape of the coefficients: [sources, columns]."""
        return (sources, *(self.shape[axis] for axis in self.axes))

    def over_weight(self, sources: int) -> tuple[int, ...]:
        """The shape in which the coefficients multiply a stack of the sources' weights: [sources, 1, columns]."""
        return (sources, *(size if axis in self.axes else 1 for axis, size in enumerate(self.shape)))

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes of the weight over which a coefficient's gradient is a sum."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.axes)


def kind_of(part: Part) -> Kind | None:
    """What a tensor counts as among the trainable parts; None for what is never trained, such as buffers."""
    role = part.role
    if any(matches_role(role, fixed) for fixed in _FIXED):
        return None
    if role == "norm" or role.endswith(".norm") or role == "scale":
        return "norm"
    if any(matches_role(role, linear) for linear in _LINEAR):
        return "linear"
    return "embedding" if matches_role(role, "embedding") else None


def _plain(name: str, part: Part, shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    """What a tensor counts as that no word of its name tells: the layers of plain networks are linear ones."""
    weight = f"{name.removesuffix('bias')}weight" if name.endswith(".bias") else name
    return "linear" if part.role == "other" and len(shapes.get(weight, ())) > 1 else None


def slots(
    parts: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    granularity: Granularity = "row+column",
    trainable: Sequence[Kind] = KINDS,
    transposed: frozenset[str] = frozenset(),
) -> tuple[Slot, ...]:
    """The coefficients of every weight.

    A column is what reads one input feature: of a matrix [out, in] it is an index of the last axis, of an embedding
    [vocabulary, width] one of the width, of experts stacked as [experts, out, in] an expert and an index of the last
    axis. A row is what makes one output feature: an index of the first axis, of an embedding a token. A norm has a
    coefficient for each entry, the bias of a linear layer one in all. Experts that are stacked in one tensor have the
    coefficients that they would have as tensors of their own. Matrices and convolutions of networks whose names tell
    nothing count as linear.

    Args:
        parts: what each tensor is, by its name on disk.
        shapes: the shapes of the tensors to merge; a tied weight stands here once.
        granularity: how many coefficients a weight has.
        trainable: which parts are trained; the others keep the coefficients that they begin with.
        transposed: names of weights stored as [in, out], such as those of GPT-2.

    Raises:
        ValueError: an unknown granularity or part.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
    if unknown := [kind for kind in trainable if kind not in KINDS]:
        raise ValueError(f"trainable parts are {', '.join(KINDS)}, not {unknown[0]!r}")
    result = []
    for name, shape in shapes.items():
        part, kind = parts[name], kind_of(parts[name]) or _plain(name, parts[name], shapes)
        layered = granularity == "layer" and part.layer is not None
        key = f"{part.stack}.{part.layer}" if layered else name
        both = granularity == "row+column"
        axes = _axes(part, kind, shape, "column" if both else granularity, name in transposed)
        slot = Slot(name, shape, axes, key, kind in trainable)
        if both and slot.trained:
            others = _axes(part, kind, shape, "row", name in transposed)
            added = Slot(name, shape, others, f"{key}{ROWS}", True, added=True)
            slot = replace(slot, rows=None if others == axes else added)
        result.append(slot)
    return tuple(result)


def _axes(
    part: Part, kind: Kind | None, shape: tuple[int, ...], granularity: Granularity, transposed: bool
) -> tuple[int, ...]:
    stacked = matches_role(part.role, "expert") and part.expert is None and len(shape) > 1
    experts = (0,) if stacked else ()
    rest = len(shape) - len(experts)
    if granularity == "layer":
        return ()
    if granularity == "tensor" or kind is None or (rest == 1 and kind == "linear"):
        return experts
    if rest < 2:
        return (*experts, *range(len(experts), len(shape)))
    first = (granularity == "row") != transposed
    # A patch embedding is a convolution [out, in, height, width]: its columns are its input channels.
    return (*experts, len(experts) if first else len(experts) + 1)


def initial(form: Form, sources: int) -> float:
    """The coefficient that training starts from: of the plain average, 1/N, in both forms and for biases too."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    return 1.0 / sources


Values = tuple[NDArray[Any], tuple[int, ...]]
"""Coefficients [sources, ...], and the axes of the weight that follow their first axis."""


@dataclass(frozen=True)
class Coefficients:
    """What training makes, by the names of weights on disk; rows that are added with :data:`ROWS` at the end.

    Attributes:
        form: whether they weigh the sources or their deltas.
        granularity: how many a weight has.
        sources: the labels of the sources, in the order of the coefficients.
        base: the label of the base; None in the form ``full``.
        values: float32 [sources, ...], of every weight, trained or not.
        axes: the axes of the weight that follow the first axis of its coefficients.
    """

    form: Form
    granularity: Granularity
    sources: tuple[str, ...]
    base: str | None
    values: Mapping[str, NDArray[np.float32]]
    axes: Mapping[str, tuple[int, ...]]

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights that have coefficients."""
        return tuple(name for name in self.values if not name.endswith(ROWS))

    def of(self, name: str) -> tuple[Values, ...]:
        """The sets of coefficients of a weight, whose sum weighs it: values and axes of each."""
        every = (name, f"{name}{ROWS}")
        return tuple((self.values[each], self.axes[each]) for each in every if each in self.values)


def apply(
    coefficients: Sequence[Values], sources: Sequence[NDArray[Any]], base: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """One merged weight in float64: ``sum_i W_i diag(c_i)``, or with a base ``W_0 + sum_i (W_i - W_0) diag(c_i)``.

    Args:
        coefficients: sets whose sum weighs the sources, each [sources, ...] and the axes of the weight that follow.
        sources: the weight in each source, all of one shape.
        base: the weight in the base; None for the form ``full``.

    Raises:
        ShapeMismatch: the weights differ in shape, or the coefficients do not fit them.
    """
    shape = np.shape(sources[0])
    problems = [
        Problem(f"source {i} has shape {np.shape(each)}, the first {shape}")
        for i, each in enumerate([*sources, *([] if base is None else [base])])
        if np.shape(each) != shape
    ]
    given = [(values, Slot("", shape, tuple(axes), "", True)) for values, axes in coefficients]
    problems += [
        Problem(f"the coefficients have shape {values.shape}, not {slot.coefficients(len(sources))}")
        for values, slot in given
        if values.shape != slot.coefficients(len(sources))
    ]
    if problems:
        raise ShapeMismatch(problems)
    first, *added = (values.astype(np.float64).reshape(slot.over_weight(len(sources))) for values, slot in given)
    factors = sum(added, first)
    start = np.zeros(shape) if base is None else base.astype(np.float64)
    total = start.copy()
    for factor, source in zip(factors, sources, strict=True):
        total += factor * (source.astype(np.float64) - (0.0 if base is None else start))
    return total
