"""Heads and the inner dimensions of values and outputs, from the tensors of one attention.

Query and key dimensions are never put in another order: rotary embeddings pair them by number.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mergetool.anatomy.symmetry import Group, Member
from mergetool.anatomy.symmetry_layers import Layer, Linear, unknown
from mergetool.anatomy.symmetry_layouts import head_counts, heads_have_places, qkv_layout, transposed

_KINDS = "heads and vo"
_KNOWN = frozenset({"q", "k", "v", "qkv", "o", "norm", "bias"})
_OF_QUERIES = re.compile(r"(^|[._])(q|query)(_|\.|$)")
_NUMBERED = re.compile(r"norms?\.\d+\.")  # a norm for each head
_OF_KEYS = re.compile(r"(^|[._])(k|key)(_|\.|$)")


@dataclass(frozen=True, slots=True)
class _Heads:
    """``groups`` key-value heads of width ``width``, with ``repeat`` query heads each."""

    groups: int
    repeat: int
    width: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the queries, keys or values of all key-value heads lie on the output axis of a matrix."""

    linear: Linear
    axis: int
    start: int
    block: int
    step: int
    role: str

    def members(self, groups: int) -> Iterator[Member]:
        stop = self.start + (groups - 1) * self.step + self.block
        step = 0 if self.step == self.block else self.step
        yield Member(self.linear.weight, self.axis, self.block, self.start, stop, step, role=self.role)
        if self.linear.bias:
            yield Member(self.linear.bias, 0, self.block, self.start, stop, step, role=self.role)


def attention_groups(layer: Layer, kinds: Collection[str], prefix: str = "attention.") -> Iterator[Group]:
    """The groups of one attention of a layer, if it has one.

    Args:
        layer: its tensors by role.
        kinds: ``heads`` and ``vo`` are made if wanted.
        prefix: of the roles: ``attention.`` or ``attention.cross.``.

    Raises:
        PlanError: the layout is not known, or the shapes are not those of the config's heads.
    """
    roles = {role.removeprefix(prefix) for role in layer.roles if role.startswith(prefix)}
    roles = {role for role in roles if "." not in role}
    if not roles or not {"heads", "vo"} & set(kinds):
        return
    if roles - _KNOWN:
        named = ", ".join(layer.of(prefix + sorted(roles - _KNOWN)[0]))
        unknown(f"this attention has {named}", layer.name, _KINDS)
    where = f"{layer.name}.{'cross.' if 'cross' in prefix else ''}"
    if strange := layer.inside(mlp=False):
        unknown(f"what {', '.join(strange[:3])} is to its heads", layer.name, _KINDS)
    output = layer.matrix(layer.of(prefix + "o"), "attention.o")
    if output is None:
        unknown("an attention without an output projection", layer.name, _KINDS)
    across = 0 if transposed(layer.config) else 1
    heads = _heads(layer, layer.shapes[output.weight][across])
    q, k, v = _places(layer, prefix, heads, 1 - across)
    width = heads.repeat * heads.width
    out = Member(output.weight, across, width, 0, heads.groups * width, role="attention.o")
    beside = tuple(_beside(layer, prefix, heads))
    if "heads" in kinds and not layer.pinned and not heads_have_places(layer.config):
        yield from _head_groups(where, heads, (q, k, v), out, beside)
    if "vo" in kinds and heads.width > 1 and not _values_have_norm(layer, prefix):
        yield from _value_groups(where, heads, v, out)


def _heads(layer: Layer, inner: int) -> _Heads:
    """Counts and width, checked against the input width of the output projection."""
    heads, groups, width = head_counts(layer.config, layer.name)
    if heads is None or groups is None:
        unknown("the config does not say how many heads there are", layer.name, _KINDS)
    width = width or inner // heads
    if heads % groups or heads * width != inner:
        said = f"{heads} query heads and {groups} key-value heads of width {width}"
        unknown(f"the output projection reads {inner} numbers, which are not {said}", layer.name, _KINDS)
    return _Heads(groups, heads // groups, width)


def _places(layer: Layer, prefix: str, heads: _Heads, axis: int) -> tuple[_Place, _Place, _Place]:
    """Where queries, keys and values lie."""
    fused = layer.matrix(layer.of(prefix + "qkv"), "attention.qkv")
    width = heads.groups * heads.width
    if fused is None:
        places = _apart(layer, prefix, heads, axis)
        lengths = (heads.repeat * width, width, width)
    else:
        places = _fused(layer, fused, heads, axis)
        lengths = ((heads.repeat + 2) * width,) * 3
    for place, length in zip(places, lengths, strict=True):
        for name in filter(None, (place.linear.weight, place.linear.bias)):
            at = layer.shapes[name][place.axis if len(layer.shapes[name]) == 2 else 0]
            if at != length:
                unknown(f"{name} has {at} outputs where its heads make {length}", layer.name, _KINDS)
    return places


def _apart(layer: Layer, prefix: str, heads: _Heads, axis: int) -> tuple[_Place, _Place, _Place]:
    """Three matrices."""
    q, k, v = (layer.matrix(layer.of(prefix + role), prefix + role) for role in "qkv")
    if q is None or k is None or v is None:
        unknown("an attention without queries, keys or values of its own", layer.name, _KINDS)
    query, key = heads.repeat * heads.width, heads.width
    return (
        _Place(q, axis, 0, query, query, "attention.q"),
        _Place(k, axis, 0, key, key, "attention.k"),
        _Place(v, axis, 0, key, key, "attention.v"),
    )


def _fused(layer: Layer, linear: Linear, heads: _Heads, axis: int) -> tuple[_Place, _Place, _Place]:
    """One matrix."""
    query, key, width = heads.repeat * heads.width, heads.width, heads.groups * heads.width
    layout = qkv_layout(layer.config)
    if layout == "blocks":
        starts, steps = (0, heads.repeat * width, (heads.repeat + 1) * width), (query, key, key)
    elif layout == "grouped":
        starts, steps = (0, query, query + key), (query + 2 * key,) * 3
    else:
        unknown(f"how queries, keys and values are fused in {linear.weight}", layer.name, _KINDS)
    return (
        _Place(linear, axis, starts[0], query, steps[0], "attention.q"),
        _Place(linear, axis, starts[1], key, steps[1], "attention.k"),
        _Place(linear, axis, starts[2], key, steps[2], "attention.v"),
    )


def _beside(layer: Layer, prefix: str, heads: _Heads) -> Iterator[Member]:
    """Norms over all heads' queries or keys, and one number for each head."""
    query, key = heads.repeat * heads.width, heads.width
    for name in layer.of(prefix + "norm"):
        shape = layer.shapes[name]
        block = query if _OF_QUERIES.search(name) else key if _OF_KEYS.search(name) else 0
        if shape == (heads.width,) and not _NUMBERED.search(name):
            continue  # the same for every head
        if shape == (block * heads.groups,):
            yield Member(name, 0, block, 0, shape[0], role="attention.norm")
        elif block and shape == (block // heads.width * heads.groups, heads.width):
            yield Member(name, 0, block // heads.width, 0, shape[0], role="attention.norm")
        else:
            unknown(f"the norm {name} {list(shape)} inside the attention", layer.name, _KINDS)
    for name in layer.of(prefix + "bias"):
        if layer.shapes[name] == (heads.groups * heads.repeat,):
            yield Member(name, 0, heads.repeat, 0, heads.groups * heads.repeat, role="attention.bias")


def _values_have_norm(layer: Layer, prefix: str) -> bool:
    names = layer.of(prefix + "norm")
    return any(not (_OF_QUERIES.search(name) or _OF_KEYS.search(name)) for name in names)


def _head_groups(
    where: str, heads: _Heads, places: tuple[_Place, _Place, _Place], out: Member, beside: tuple[Member, ...]
) -> Iterator[Group]:
    if heads.groups * heads.repeat == 1:
        return
    moving = [member for place in places for member in place.members(heads.groups)]
    yield Group(f"{where}heads", "heads", heads.groups, (*moving, out, *beside), module=f"{where}attention")
    if heads.repeat == 1:
        return
    for group in range(heads.groups):
        queries = [*places[0].members(heads.groups), out, *beside]
        inside = tuple(_inside(member, group, heads) for member in queries if _by_query(member, heads))
        name = f"{where}heads.{group}"
        yield Group(name, "heads", heads.repeat, inside, module=f"{where}attention", unit=group)


def _by_query(member: Member, heads: _Heads) -> bool:
    """Whether a unit of the member is divided among query heads, where keys and values have one part only."""
    return member.role in ("attention.q", "attention.o", "attention.bias") or (
        member.role == "attention.norm" and bool(_OF_QUERIES.search(member.tensor))
    )


def _inside(member: Member, group: int, heads: _Heads) -> Member:
    """The query heads of one key-value head."""
    start = member.start + group * member.stride
    block = member.block // heads.repeat
    return replace(member, block=block, start=start, stop=start + member.block, step=0)


def _value_groups(where: str, heads: _Heads, v: _Place, out: Member) -> Iterator[Group]:
    width = heads.width
    for group in range(heads.groups):
        start = v.start + group * v.step
        values = replace(v, start=start, block=1, step=1).members(width)
        outputs = (
            Member(out.tensor, out.axis, 1, start, start + width, role="attention.o")
            for start in range(group * out.block, (group + 1) * out.block, width)
        )
        name = f"{where}vo.{group}"
        yield Group(name, "vo", width, (*values, *outputs), module=f"{where}attention", unit=group)
