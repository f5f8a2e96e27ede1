"""Matching by weights: units are alike if the weights that make them and that read them are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np

from mergetool.anatomy.symmetry import Group, Indices, Member, Turning, turned_array
from mergetool.errors import ShapeMismatch
from mergetool.facts.matching_descent import (
    DEFAULT_MARGIN,
    DEFAULT_SWEEPS,
    Array,
    Get,
    Matching,
    Score,
    Solver,
    State,
    match_all,
)
from mergetool.facts.matching_heads import Attention, head_scores, settle_heads

AddProducts = Callable[[Array, Array, Array], None]
"""Adds the inner products of all rows of two float32 matrices to a third: ``add(scores, left, right)``."""

_SKETCH = 64
"""Random vectors that experts are compared on."""
ROWS = 1024
"""Rows of a matrix of scores that are made at once, so that no second matrix of its size is."""
_STATISTICS = ("running_mean", "running_var")


def add_products(scores: Array, left: Array, right: Array) -> None:
    """Add ``left @ right.T`` to ``scores``, some rows at a time."""
    for start in range(0, len(left), ROWS):
        scores[start : start + ROWS] += left[start : start + ROWS] @ right.T


def weight_matching(
    groups: Sequence[Group],
    reference: Get,
    other: Get,
    *,
    fixed: Mapping[str, Indices] | None = None,
    seed: int = 0,
    max_sweeps: int = DEFAULT_SWEEPS,
    margin: float = DEFAULT_MARGIN,
    cosine: bool = False,
    add: AddProducts = add_products,
) -> Matching:
    """Permutations of ``other`` towards ``reference`` (Git Re-Basin, arXiv:2209.04836, by coordinate descent).

    The cost of a group is ``C = sum over members of unfold(W_a) @ unfold(W_b).T``, with W_b turned by the other groups,
    and ``sum(C[i, p[i]])`` is maximised. Heads are compared by what no change of basis inside them alters:
    ``<Wq_i^T Wk_i, Wq_j^T Wk_j> + <Wo_i Wv_i, Wo_j Wv_j>``, each divided by its norms. Experts whose hidden units are
    turned too are compared by ``W_down W_up`` and ``W_down W_gate`` on random vectors, and by their router rows.

    Only the tensors of what is solved at once are held: those of one attention, one MLP or one expert. The residual
    stream is gone over one tensor at a time, and every tensor is then read again in every sweep.

    Args:
        groups: from :func:`mergetool.anatomy.symmetries`.
        reference: reads a tensor of the model that stays as it is.
        other: reads a tensor of the model that is turned.
        fixed: permutations that are known already.
        seed: of the order in which groups are gone over.
        max_sweeps: at most so many rounds over groups that share tensors.
        margin: the least gain over the identity, as a share of a perfect match; judged for each cycle.
        cosine: compare directions only, for models whose units differ in scale.
        add: adds products of rows; hidden units of large models take long without another device.

    Raises:
        ShapeMismatch: the models differ in the shape of a tensor.
        NonFinite: there is a NaN or an infinity among the weights.
    """

    def solver(component: list[Group]) -> Solver:
        return _Weights(reference, other, cosine, add).solve

    return match_all(groups, solver, fixed or {}, seed, max_sweeps, margin)


class _Weights:
    """The tensors of two models, held while the same ones are asked for."""

    def __init__(self, reference: Get, other: Get, cosine: bool, add: AddProducts) -> None:
        self._get = (reference, other)
        self._add = add
        self._cosine = cosine
        self._held: tuple[dict[str, Array], dict[str, Array]] = ({}, {})

    def solve(self, state: State, step: Sequence[Group]) -> None:
        """Find the permutations of one step."""
        group = step[0]
        if group.kind == "heads" and group.unit < 0:
            self._heads(state, step)
            return
        inner = {each.unit: each for each in state.groups.values() if each.module == group.module and each.unit >= 0}
        if group.kind == "experts" and inner:
            state.settle(group, self._experts(state, group, inner))
            return
        for each in step:
            state.settle(each, self._units(state, each))

    def _read(self, model: int, name: str) -> Array:
        held = self._held[model]
        if name not in held:
            held[name] = self._get[model](name)
        return held[name]

    def _keep(self, names: Collection[str]) -> None:
        for held in self._held:
            for name in held.keys() - set(names):
                del held[name]

    def _pair(self, turning: Turning, member: Member, across: Turning | None = None) -> tuple[Array, Array]:
        """The units of one member in both models, [size, numbers of a unit], the other's turned.

        Along the other axes it is turned by ``across``, where that is not the same.
        """
        values = self._read(1, member.tensor)
        tensor, slab, start = turning.lands(member, values.shape[member.axis])
        indices = turning.of(tensor, values.shape).indices
        if across is not None:
            along = {at: index for at, index in indices.items() if at == member.axis}
            indices = {**across.of(tensor, values.shape).indices, **along}
            if member.axis not in along:
                indices.pop(member.axis, None)
        reference, axis = self._read(0, tensor), member.axis
        if reference.shape != values.shape:
            what = f"has shape {list(values.shape)}, and {tensor} of the reference {list(reference.shape)}"
            raise ShapeMismatch(what, member.tensor, "align models of one architecture and size")
        if slab is not None and member.slab is not None:
            reference, values, axis = reference[slab], values[member.slab], axis - 1
            indices = {at - 1: index[slab] if index.ndim == 2 else index for at, index in indices.items() if at}
        places = member.places(start)
        # Only the region is gathered: a head's columns are a sliver of the whole projection.
        order = indices[axis][places.reshape(-1)] if axis in indices else places.reshape(-1)
        turned = turned_array(values.take(order, axis), {at: index for at, index in indices.items() if at != axis})
        return _rows(reference.take(places.reshape(-1), axis), axis, places), _rows(turned, axis, places)

    def _units(self, state: State, group: Group) -> Score:
        """``C_p`` of a group whose units are compared number by number."""
        turning = state.turning([group.name])
        streamed = group.kind == "residual"
        scores = np.zeros((group.size, group.size), np.float32)
        squares = np.zeros((2, group.size))
        names = () if streamed else group.tensors
        self._keep([*names, *map(turning.place, names)])
        for left, right in self._pairs(turning, group, state.turning()):
            self._add(scores, left, right)
            squares += [_squares(left), _squares(right)]
            if streamed:
                self._keep(())
        norms = np.sqrt(squares)
        if self._cosine:
            norms[norms == 0] = 1.0
            scores = (scores / norms[0][:, None] / norms[1]).astype(np.float32)
            norms = np.ones_like(norms)
        return Score(scores, norms[0], norms[1])

    def _pairs(self, turning: Turning, group: Group, current: Turning) -> Iterator[tuple[Array, Array]]:
        axes = Counter(tensor for tensor, _ in {(member.tensor, member.axis) for member in group.members})
        for member in group.members:
            if not member.tensor.endswith(_STATISTICS):  # the scale of data, not of weights
                # From the residual stream to itself: the other axis has the order that was found last.
                yield self._pair(turning, member, current if axes[member.tensor] > 1 else None)
        for row in group.rows:
            pair = []
            for model in (0, 1):
                found = [self._read(model, name) for name in row.tensors]
                if model:
                    found = [
                        turned_array(each, turning.of(n, each.shape).indices) for n, each in zip(row.tensors, found)
                    ]
                pair.append(np.stack([each.reshape(-1) for each in found]))
            yield pair[0], pair[1]

    def _heads(self, state: State, step: Sequence[Group]) -> None:
        outer, inner = step[0], {group.unit: group for group in step[1:]}
        self._keep([name for each in state.groups.values() if each.module == outer.module for name in each.tensors])
        module = [each.name for each in state.groups.values() if each.module == outer.module]
        turning = state.turning(module)
        attentions = []
        for model in (0, 1):
            parts: dict[str, list[Array]] = {role: [] for role in ("q", "k", "v", "o")}
            for member in outer.members:
                role = member.role.removeprefix("attention.")
                if role in parts:
                    parts[role].append(_blocks(self._pair(turning, member)[model], member))
            attentions.append(Attention.of({role: np.concatenate(found, 2) for role, found in parts.items()}))
        settle_heads(state, outer, inner, head_scores(*attentions))

    def _experts(self, state: State, group: Group, inner: Mapping[int, Group]) -> Score:
        """The mean cosine of router rows and of what experts make of random vectors."""
        module = [group.name, *(each.name for each in inner.values())]
        turning = state.turning(module)
        routers = [self._pair(turning, member) for member in group.members if member.role == "router"]
        routers = [pair for pair in routers if pair[0].shape[1] > 1]
        compared = [[pair[model] for pair in routers] for model in (0, 1)]
        sketches: list[list[list[Array]]] = [[], []]
        for unit in range(group.size):
            self._keep(inner[unit].tensors)
            pairs = {member: self._pair(turning, member) for member in inner[unit].members}
            for model in (0, 1):
                sketches[model].append(_sketch({member: pair[model] for member, pair in pairs.items()}))
        for model in (0, 1):
            compared[model] += [np.stack(feature) for feature in zip(*sketches[model], strict=True)]
        scores = np.mean([_cosines(left, right) for left, right in zip(*compared, strict=True)], axis=0)
        return Score(scores, np.ones(group.size), np.ones(group.size))


def _rows(region: Array, axis: int, places: Indices) -> Array:
    """The units of a region as rows: [size, numbers of a unit]."""
    return np.ascontiguousarray(np.moveaxis(region, axis, 0).reshape(len(places), -1))


def _blocks(units: Array, member: Member) -> Array:
    """Units as their rows: [size, block, numbers of a row]."""
    return units.reshape(len(units), member.block, -1)


def _squares(units: Array) -> Array:
    return np.asarray(np.einsum("ij,ij->i", units, units, dtype=np.float64))


def _cosines(left: Array, right: Array) -> Array:
    norms = np.sqrt(np.outer(_squares(left), _squares(right)))
    return np.asarray((left @ right.T) / np.where(norms == 0, 1.0, norms))


def _sketch(units: Mapping[Member, Array]) -> list[Array]:
    """What one expert makes of random vectors, for its gate and its up: unaltered by the order of its hidden units."""
    down = next(values for member, values in units.items() if member.role == "expert.down")
    made: dict[str, list[Array]] = {}
    for member, values in units.items():
        if member.role != "expert.down":
            made.setdefault(member.role, []).append(_project(values))
    return [(down.T @ np.concatenate(parts, axis=1)).reshape(-1) for parts in made.values()]


def _project(values: Array) -> Array:
    """Rows on at most a few random directions, the same for all experts of a model."""
    width = values.shape[1]
    if width <= _SKETCH:
        return values
    directions = np.random.default_rng(width).standard_normal((width, _SKETCH)) / np.sqrt(_SKETCH)
    return np.asarray(values @ directions.astype(values.dtype))
