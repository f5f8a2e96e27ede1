"""Permutations that leave a model's function alone: groups of units, and what they do to each axis of a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Permutations = Mapping[str, Indices]
"""Name of a group → which unit of the source stands at each place; a group that is left out keeps its order."""
Kind = Literal["mlp", "heads", "vo", "experts", "residual", "units"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A region of one axis of one tensor that moves with a group, counted in the source's coordinates.

    Unit ``u`` is ``[start + u * stride, start + u * stride + block)``.

    Attributes:
        tensor: its name on disk.
        axis: the axis that moves.
        block: neighbouring indices that one unit takes.
        start: where the first unit begins.
        stop: where the last unit ends.
        step: from the start of one unit to the next, where units of something else lie between; 0 is ``block``.
        slab: the only index of axis 0 that moves: the expert in a tensor that holds them all.
        role: what this region is, also where several parts are fused in one tensor.
    """

    tensor: str
    axis: int
    block: int
    start: int
    stop: int
    step: int = 0
    slab: int | None = None
    role: str = ""

    @property
    def stride(self) -> int:
        """From the start of one unit to the start of the next."""
        return self.step or self.block

    def places(self, start: int | None = None) -> Indices:
        """The indices that each unit takes: [units, block]; of a region moved to ``start`` if given."""
        span = np.arange(0, self.stop - self.start, self.stride, dtype=np.int64)
        first = self.start if start is None else start
        return np.asarray(first + span[:, None] + np.arange(self.block))


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor for each unit, such as the down projections of all experts: the units' order is in the names."""

    tensors: tuple[str, ...]
    role: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Units that may be put in any order together, wherever they appear.

    Attributes:
        name: unique in its model, and the name of its permutation in a folder of facts.
        kind: ``mlp`` hidden units of an MLP or an expert; ``heads`` key-value heads with their query heads, or the
            query heads of one key-value head; ``vo`` the inner dimensions of values and outputs of one key-value
            head; ``experts``; ``residual`` the whole stream; ``units`` of a plain network.
        size: how many units.
        members: regions of axes.
        rows: whole tensors, one for each unit.
        module: what groups that are solved together share.
        unit: the unit of the module's outer group that this group lies inside; -1 outside of any.
    """

    name: str
    kind: Kind
    size: int
    members: tuple[Member, ...]
    rows: tuple[Row, ...] = ()
    module: str = ""
    unit: int = -1

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that it moves, each once."""
        rows = (name for row in self.rows for name in row.tensors)
        return tuple(dict.fromkeys([*(member.tensor for member in self.members), *rows]))


@dataclass(frozen=True, slots=True)
class Turn:
    """How one turned tensor is read from its source.

    ``turned = W.take(indices[0], 0).take(indices[1], 1)…``. An array of two axes, ``[shape[0], shape[axis]]``, has an
    order of its own for each index of the turned tensor's axis 0:
    ``turned[e, r] = W[indices[0][e], indices[1][e, r]]``.

    Attributes:
        tensor: the name in the source.
        indices: axis → index array; axes that stay as they are do not appear.
    """

    tensor: str
    indices: Mapping[int, Indices] = field(default_factory=dict)


class Turning:
    """Groups with their permutations, looked up by tensor.

    Unit ``j`` of a turned tensor is unit ``permutation[j]`` of the source. Groups inside units of another one (query
    heads in a key-value group, hidden units in an expert) are named by the source's units and act first.

    Args:
        groups: all groups of a model; those without a permutation stay as they are.
        permutations: an index array of the group's size by the group's name.

    Raises:
        ValueError: an array is no permutation of its group, or there is no such group.
    """

    def __init__(self, groups: Iterable[Group], permutations: Permutations) -> None:
        self._acting: dict[str, list[tuple[Group, Member]]] = defaultdict(list)
        self._rows: dict[str, tuple[Group, Row, int]] = {}
        known = {group.name: group for group in groups}
        for name, permutation in permutations.items():
            if name not in known:
                raise ValueError(f"there is no group {name!r}")
            _check(known[name], permutation)
        self._moved = {name: p for name, p in permutations.items() if not is_identity(p)}
        for name in self._moved:
            group = known[name]
            for member in group.members:
                self._acting[member.tensor].append((group, member))
            for row in group.rows:
                self._rows.update({tensor: (group, row, place) for place, tensor in enumerate(row.tensors)})

    def of(self, tensor: str, shape: Shape) -> Turn:
        """How the turned tensor of this name and shape is read."""
        source = self.source(tensor)
        acting = sorted(self._acting.get(source, ()), key=lambda pair: pair[1].block)
        return Turn(source, _compose(acting, self._moved, shape))

    def source(self, tensor: str) -> str:
        """The name in the source of what bears this name in the turned model."""
        if tensor not in self._rows:
            return tensor
        group, row, place = self._rows[tensor]
        return row.tensors[int(self._moved[group.name][place])]

    def place(self, tensor: str) -> str:
        """The name in the turned model of what bears this name in the source."""
        if tensor not in self._rows:
            return tensor
        group, row, place = self._rows[tensor]
        return row.tensors[int(np.flatnonzero(self._moved[group.name] == place)[0])]

    def along(self, tensor: str, axis: int, length: int) -> Indices:
        """The index array of one axis of a tensor of the source, without any order of whole slabs or tensors."""
        acting = [pair for pair in self._acting.get(tensor, ()) if pair[1].axis == axis and pair[1].slab is None]
        acting.sort(key=lambda pair: pair[1].block)
        return _compose(acting, self._moved, {axis: length}).get(axis, identity(length))

    def lands(self, member: Member, length: int) -> tuple[str, int | None, int]:
        """Where a region of the source comes to lie: tensor, slab and start.

        Args:
            member: the region.
            length: of its axis.
        """
        slab = member.slab
        around = [pair for pair in self._acting.get(member.tensor, ()) if pair[1].block > member.block]
        start = member.start
        for group, outer in sorted(around, key=lambda pair: pair[1].block):
            if outer.axis == member.axis and outer.slab is None:
                order = _order(outer, self._moved[group.name], length)
                start = int(np.flatnonzero(order == start)[0])
        for group, outer in self._acting.get(member.tensor, ()):
            if slab is not None and outer.axis == 0:
                slab = int(np.flatnonzero(self._moved[group.name] == slab)[0])
        return self.place(member.tensor), slab, start


def axis_indices(groups: Iterable[Group], permutations: Permutations, tensor: str, shape: Shape) -> dict[int, Indices]:
    """The index array of each axis that moves, for one tensor; see :class:`Turn`.

    Where whole tensors change places too, as experts with tensors of their own do, :class:`Turning` also says which
    tensor of the source they belong to; ``tensor`` is the name in the turned model.

    Raises:
        ValueError: an array is no permutation of its group.
    """
    return dict(Turning(groups, permutations).of(tensor, shape).indices)


def turned_array(values: NDArray[Any], indices: Mapping[int, Indices]) -> NDArray[Any]:
    """A tensor with its axes in the order that ``indices`` say, as :class:`Turn` does; the same array if none does.

    Args:
        values: the source's tensor, of any dtype.
        indices: axis → index array.
    """
    for axis, index in sorted(indices.items()):
        if index.ndim == 1:
            values = values.take(index, axis)
        else:
            values = np.stack([slab.take(order, axis - 1) for slab, order in zip(values, index, strict=True)])
    return values


def identity(size: int) -> Indices:
    """The permutation that leaves everything where it is."""
    return np.arange(size, dtype=np.int64)


def is_identity(indices: Indices) -> bool:
    """Whether every index, along the last axis, stands at its own place."""
    return bool((indices == np.arange(indices.shape[-1])).all())


def _check(group: Group, permutation: Indices) -> None:
    if permutation.shape != (group.size,) or not np.array_equal(np.sort(permutation), np.arange(group.size)):
        raise ValueError(f"what is given for {group.name!r} is no permutation of its {group.size} units")


def _order(member: Member, permutation: Indices, length: int) -> Indices:
    """The index array of one member alone."""
    order, places = identity(length), member.places()
    order[places] = places[permutation]
    return order


def _compose(
    acting: Iterable[tuple[Group, Member]], moved: Permutations, shape: Shape | Mapping[int, int]
) -> dict[int, Indices]:
    """One index array per axis from members sorted from fine to coarse."""
    indices: dict[int, Indices] = {}
    for group, member in acting:
        axis, length = member.axis, shape[member.axis]
        order = _order(member, moved[group.name], length)
        before = indices.get(axis, identity(length))
        if member.slab is None:
            indices[axis] = before[..., order]
        else:
            if before.ndim == 1:
                before = np.tile(before, (shape[0], 1))
            before[member.slab] = before[member.slab][order]
            indices[axis] = before
    if 0 in indices:
        # Until here a row speaks of the source's slab: the turned tensor has that slab elsewhere.
        indices = {axis: index[indices[0]] if index.ndim == 2 else index for axis, index in indices.items()}
    return {axis: index for axis, index in indices.items() if not is_identity(index)}
