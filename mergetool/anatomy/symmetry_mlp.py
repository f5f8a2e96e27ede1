"""Hidden units of MLPs and of experts, and the experts themselves, from the tensors of one layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from mergetool.anatomy.symmetry import Group, Member, Row
from mergetool.anatomy.symmetry_layers import Layer, unknown
from mergetool.anatomy.symmetry_layouts import gate_up_layout, transposed, transposed_experts

_PARTS = ("gate", "up", "gate_up", "down")


def mlp_groups(layer: Layer, kinds: Collection[str]) -> Iterator[Group]:
    """One group for the hidden units of every MLP of a layer that all tokens go through.

    Raises:
        PlanError: shapes or layout are not known.
    """
    if "mlp" not in kinds:
        return
    modules = _modules(layer, "mlp.")
    for parent, parts in modules.items():
        name = f"{layer.name}.mlp" if len(modules) == 1 else parent
        yield from _hidden(layer, name, parts, "mlp.", parent)


def expert_groups(layer: Layer, kinds: Collection[str]) -> Iterator[Group]:
    """The experts of a layer, and the hidden units of each.

    Raises:
        PlanError: shapes or layout are not known.
    """
    names = [name for part in _PARTS for name in layer.of(f"expert.{part}")]
    if not names or not {"mlp", "experts"} & set(kinds):
        return
    apart = [name for name in names if name in layer.experts]
    if apart and len(apart) < len(names):
        unknown("some experts have tensors of their own and others share one", layer.name, "mlp and experts")
    module = f"{layer.name}.experts"
    count = max(layer.experts[name] for name in apart) + 1 if apart else layer.shapes[names[0]][0]
    size = _routing_groups(layer, count)
    if "experts" in kinds and size > 1:
        yield from _orders(layer, module, count, size, bool(apart))
    if "mlp" in kinds:
        for expert in range(count):
            name, unit = f"{module}.{expert}.mlp", (expert % size if size > 1 else -1)
            inside = module if size == count else f"{module}.group.{expert // size}"
            if apart:
                own = {
                    part: [each for each in layer.of(f"expert.{part}") if layer.experts[each] == expert]
                    for part in _PARTS
                }
                yield from _hidden(layer, name, own, "expert.", inside, unit)
            else:
                yield from _hidden_slab(layer, name, expert, inside, unit)


def _routing_groups(layer: Layer, count: int) -> int:
    """How many experts may change places: a router that first chooses groups keeps each where it is."""
    groups = layer.config.get("n_group")
    groups = groups if isinstance(groups, int) and groups > 1 else 1
    if count % groups:
        unknown(f"{count} experts in {groups} groups", layer.name, "experts")
    return count // groups


def _orders(layer: Layer, module: str, count: int, size: int, apart: bool) -> Iterator[Group]:
    routers = [name for name in layer.of("router") if layer.shapes[name][:1] == (count,)]
    if not routers:
        unknown(f"no router has a row for each of {count} experts", layer.name, "experts")
    stacked = () if apart else tuple(name for part in _PARTS for name in layer.of(f"expert.{part}"))
    for name in stacked:
        if layer.shapes[name][:1] != (count,):
            unknown(f"{name} has no slab for each of {count} experts", layer.name, "experts")
    for first in range(0, count, size):
        members = tuple(
            Member(name, 0, 1, first, first + size, role=role)
            for role, names in (("router", routers), ("experts", stacked))
            for name in names
        )
        rows = tuple(_rows(layer, range(first, first + size))) if apart else ()
        name = module if size == count else f"{module}.group.{first // size}"
        yield Group(name, "experts", size, members, rows, module=name)


def _rows(layer: Layer, experts: range) -> Iterator[Row]:
    """One row for each matrix or bias that every expert has."""
    for part in _PARTS:
        by_axes: dict[int, dict[int, str]] = defaultdict(dict)
        for name in layer.of(f"expert.{part}"):
            if layer.experts[name] in experts:
                by_axes[len(layer.shapes[name])][layer.experts[name]] = name
        for found in by_axes.values():
            shapes = {layer.shapes[name] for name in found.values()}
            if sorted(found) != list(experts) or len(shapes) > 1:
                unknown(f"not every expert has an {part} projection of the same shape", layer.name, "experts")
            yield Row(tuple(found[expert] for expert in experts), f"expert.{part}")


def _modules(layer: Layer, prefix: str) -> dict[str, dict[str, list[str]]]:
    """The MLPs of a layer: all tensors are one where no part comes twice, else those with a common parent are."""
    every = {part: list(layer.of(prefix + part)) for part in _PARTS}
    if not any(every.values()):
        return {}
    if all(sum(len(layer.shapes[name]) > 1 for name in names) <= 1 for names in every.values()):
        return {f"{layer.name}.mlp": every}
    modules: dict[str, dict[str, list[str]]] = {}
    for part, names in every.items():
        for name in names:
            parent = name.rsplit(".", 2)[0]
            modules.setdefault(parent, {each: [] for each in _PARTS})[part].append(name)
    return modules


def _hidden(
    layer: Layer, name: str, parts: dict[str, list[str]], prefix: str, module: str, unit: int = -1
) -> Iterator[Group]:
    """The hidden units of one MLP whose tensors are matrices."""
    down = layer.matrix(parts["down"], prefix + "down")
    ups = {part: layer.matrix(parts[part], prefix + part) for part in ("gate", "up", "gate_up")}
    found = {part: linear for part, linear in ups.items() if linear is not None}
    if down is None or not found or ("gate_up" in found and len(found) > 1):
        unknown(f"an MLP of {', '.join([*found, *(['down'] if down else [])]) or 'nothing'}", name, "mlp")
    if strange := layer.inside(mlp=True):
        unknown(f"what {', '.join(strange[:3])} is to its hidden units", layer.name, "mlp")
    across = 0 if transposed(layer.config) else 1
    size = layer.shapes[down.weight][across]
    members = [Member(down.weight, across, 1, 0, size, role=prefix + "down")]
    for part, linear in found.items():
        for tensor in filter(None, (linear.weight, linear.bias)):
            axis = 1 - across if len(layer.shapes[tensor]) == 2 else 0
            members += _up(layer, tensor, axis, size, part, prefix)
    if size > 1:
        yield Group(name, "mlp", size, tuple(members), module=module, unit=unit)


def _up(
    layer: Layer, tensor: str, axis: int, size: int, part: str, prefix: str, slab: int | None = None
) -> Iterator[Member]:
    """The hidden units on the output axis of gate, up or both."""
    length = layer.shapes[tensor][axis]
    if part != "gate_up":
        if length != size:
            unknown(f"{tensor} has {length} outputs where down reads {size}", layer.name, "mlp")
        yield Member(tensor, axis, 1, 0, size, slab=slab, role=prefix + part)
        return
    layout = gate_up_layout(layer.config)
    if not layout or length != 2 * size:
        unknown(f"how gate and up are fused in {tensor} {list(layer.shapes[tensor])}", layer.name, "mlp")
    for number, role in enumerate(("gate", "up")):
        if layout == "halves":
            yield Member(tensor, axis, 1, number * size, (number + 1) * size, slab=slab, role=prefix + role)
        else:
            yield Member(tensor, axis, 1, number, 2 * size - 1 + number, 2, slab, prefix + role)


def _hidden_slab(layer: Layer, name: str, expert: int, module: str, unit: int) -> Iterator[Group]:
    """The hidden units of one expert in tensors that hold all of them."""
    down = [each for each in layer.of("expert.down") if len(layer.shapes[each]) == 3]
    if len(down) != 1:
        unknown("the down projections of fused experts should be one tensor of three axes", layer.name, "mlp")
    flipped = transposed_experts(layer.config)
    across = 1 if flipped else 2
    size = layer.shapes[down[0]][across]
    members = [Member(down[0], across, 1, 0, size, slab=expert, role="expert.down")]
    for part in ("gate", "up", "gate_up"):
        for tensor in layer.of(f"expert.{part}"):
            axes = len(layer.shapes[tensor])
            if axes not in (2, 3):
                unknown(f"{tensor} has {axes} axes", layer.name, "mlp")
            axis = 1 if axes == 2 or not flipped else 2
            members += _up(layer, tensor, axis, size, part, "expert.", expert)
    if len(members) < 2:
        unknown("fused experts without up projections", layer.name, "mlp")
    if size > 1:
        yield Group(name, "mlp", size, tuple(members), module=module, unit=unit)
