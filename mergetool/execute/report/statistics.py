"""The sections about what was measured of single sources: the inputs of their matrices, their Fisher information."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import ROLES, Part
from mergetool.execute.fact_folder import Facts, mapped
from mergetool.execute.report.depth import Depth
from mergetool.publish.sections import Cell, Panel, Section, Series, rounded

_PANELS = 6
"""So many kinds of tensors have a panel of their own, at most."""
_RANK = {role: rank for rank, role in enumerate(ROLES)}
_ROWS = 1 << 22
"""Numbers that are looked at together."""


def inputs_section(measured: Mapping[str, Facts], parts: Mapping[str, Part], depth: Depth) -> Section | None:
    """How many directions the inputs of every matrix take up; None where no inputs were measured.

    Args:
        measured: the Gram matrices, by the source's name.
        parts: what the tensors are.
        depth: their places.
    """
    found = {source: dict(_directions(facts)) for source, facts in measured.items()}
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    if not names:
        return None
    aliases = _sharing(next(iter(measured.values())))
    kinds = {name: _kind(name, aliases, parts) for name in names}
    order = sorted(set(kinds.values()), key=lambda kind: _RANK.get(kind.partition(",")[0], len(_RANK)))
    panels = []
    for kind in order[:_PANELS]:
        mine = [name for name in names if kinds[name] == kind]
        local = depth.only(depth.at[name] for name in mine if name in depth.at)
        series = [
            Series(source, local.means([(n, each[n][1], 1.0) for n in mine if n in each]), colour)
            for colour, (source, each) in enumerate(found.items())
        ]
        panels.append(Panel(kind, local.places, tuple(series)))
    rows: list[tuple[Cell, ...]] = [
        (source, name, kinds[name], size, rounded(directions), rounded(count), rounded(mean))
        for source, each in found.items()
        for name, (size, directions, count, mean) in each.items()
    ]
    tokens = {source: max(count for *_, count, _ in each.values()) for source, each in found.items() if each}
    short = sum(1 for each in found.values() for size, _, count, _ in each.values() if count < size)
    every = sum(map(len, found.values()))
    return Section(
        name="inputs",
        title="Inputs that RegMean solves for",
        found="Measured on "
        + ", ".join(f"{count:,.0f} tokens of {source}" for source, count in tokens.items())
        + (f"; {short} of {every} matrices saw fewer tokens than they have inputs." if short else "."),
        reading="How many directions the inputs of a matrix spread over, (trace G)² / ‖G‖² of their Gram matrix G: as "
        "many as there are inputs if all matter alike, 1 if all inputs lie on one line. Along directions that inputs "
        "take up, the merged matrix does what each source does; along the others it is held only by `ridge`.",
        warning="Curves near 1: a few large channels outweigh the rest, and the solution is about these; lower "
        "`off_diagonal` or raise `ridge`. Fewer tokens than inputs: give more calibration data. Curves that lie "
        "far apart: the data of the sources are no match for each other, such as texts of different lengths.",
        x="layer",
        y="directions of the inputs",
        panels=tuple(panels),
        scale="log",
        columns=("source", "weight", "used by", "inputs", "directions", "tokens", "mean square"),
        rows=tuple(rows),
    )


def _directions(facts: Facts) -> Iterator[tuple[str, tuple[int, float, float, float]]]:
    """Of every Gram matrix its size, its directions, the tokens it was taken on, and the mean square of an input."""
    for name in _named(facts, "gram"):
        gram = mapped(*facts.place(name, "gram"))
        size = gram.shape[-1]
        matrices = gram.reshape(-1, size, size)
        # A matrix without tokens, of an expert that was never chosen, has no directions.
        each = [m for m in map(_spread, matrices) if m[1] > 0]
        count = float(np.max(facts.get(name, "count")))
        if each and count > 0:
            traces, squares = np.array(each).T
            yield name, (size, float(np.mean(traces**2 / squares)), count, float(np.mean(traces)) / count / size)


def _spread(gram: NDArray[Any]) -> tuple[float, float]:
    """Trace and squared norm of a matrix, a run of rows at a time."""
    rows = max(1, _ROWS // max(1, gram.shape[-1]))
    runs = (np.asarray(gram[i : i + rows], np.float64) for i in range(0, len(gram), rows))
    return float(np.trace(gram, dtype=np.float64)), float(sum(np.vdot(run, run) for run in runs))


def _named(facts: Facts, field: str) -> list[str]:
    """The tensors that a folder itself has a field of; those that share another's are not told twice."""
    return [key.removesuffix(f":{field}") for key in facts.entries if key.endswith(f":{field}")]


def _sharing(facts: Facts) -> Mapping[str, list[str]]:
    """The tensors that have one input, by the one that it is kept under."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, holder in facts.aliases.items():
        found[holder].append(name)
    return found


def _kind(name: str, aliases: Mapping[str, Sequence[str]], parts: Mapping[str, Part]) -> str:
    """Whose inputs these are, as roles: ``attention.q, k, v``."""
    used = {parts[each].role for each in (name, *aliases.get(name, ())) if each in parts}
    roles = sorted(used, key=_RANK.__getitem__)
    first, _, _ = roles[0].partition(".") if roles else ("other", "", "")
    if len(roles) > 1 and all(role.startswith(f"{first}.") for role in roles):
        return f"{first}." + ", ".join(role.removeprefix(f"{first}.") for role in roles)
    return ", ".join(roles) or "other"


def fisher_section(
    measured: Mapping[str, Facts], floors: Mapping[str, float], parts: Mapping[str, Part], depth: Depth
) -> Section | None:
    """Where the Fisher information of every source lies; None where none was measured.

    Args:
        measured: squared gradients, by the source's name.
        floors: the least importance of a weight, by the tensor's name.
        parts: what the tensors are.
        depth: their places.
    """
    masses = {source: dict(_masses(facts, floors)) for source, facts in measured.items()}
    totals = {source: sum(mass for mass, *_ in each.values()) for source, each in masses.items()}
    if not any(totals.values()):
        return None
    shares = {
        source: {name: mass / totals[source] for name, (mass, *_) in each.items()}
        for source, each in masses.items()
        if totals[source]
    }
    by_kind: dict[str, float] = defaultdict(float)
    for each in shares.values():
        for name, share in each.items():
            by_kind[_group(name, parts)] += share / len(shares)
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])[:_PANELS]
    rows: list[tuple[Cell, ...]] = [
        (source, name, _group(name, parts), rounded(mass), rounded(shares[source][name]), size, rounded(above))
        for source, each in masses.items()
        if source in shares
        for name, (mass, size, above) in each.items()
    ]
    sums = [np.sum([(above * size, size) for _, size, above in each.values()], axis=0) for each in masses.values()]
    return Section(
        name="fisher",
        title="Where the Fisher information lies",
        found="Share of the whole, mean of the sources: "
        + ", ".join(f"{kind} {by_kind[kind]:.1%}" for kind in kinds)
        + ". Weights above `floor`: "
        + ", ".join(f"{source} {above / size:.0%}" for source, (above, size) in zip(masses, sums, strict=True))
        + ".",
        reading="Each curve of a source sums to 100 % over all panels and layers. A weight counts in the merge as "
        "much as its source's predictions depend on it; where one source's curve is above the others', that source "
        "prevails.",
        warning="Few weights above `floor`: all others count alike and their merge is a plain average; lower it. "
        "Sums (in the table) that differ much between sources: the one with the largest prevails everywhere; give it "
        "less `weight`.",
        x="layer",
        y="% of the information",
        panels=tuple(_fisher_panel(kind, shares, parts, depth) for kind in kinds),
        limits=(0.0, 0.0),
        columns=("source", "weight", "part", "sum of squared gradients", "share", "weights", "above floor"),
        rows=tuple(rows),
    )


def _fisher_panel(
    kind: str, shares: Mapping[str, Mapping[str, float]], parts: Mapping[str, Part], depth: Depth
) -> Panel:
    mine = [name for name in parts if _group(name, parts) == kind and name in depth.at]
    local = depth.only(depth.at[name] for name in mine)
    series = [
        Series(source, local.sums([(name, each[name], 100.0) for name in mine if name in each]), colour)
        for colour, (source, each) in enumerate(shares.items())
    ]
    return Panel(kind, local.places, tuple(series))


def _group(name: str, parts: Mapping[str, Part]) -> str:
    return parts[name].role.partition(".")[0] if name in parts else "other"


def _masses(facts: Facts, floors: Mapping[str, float]) -> Iterator[tuple[str, tuple[float, int, float]]]:
    """The sum of every tensor's squared gradients, how many weights it has, and the share of those above the floor."""
    for name in _named(facts, "squared_gradient"):
        values = mapped(*facts.place(name, "squared_gradient")).reshape(-1)
        floor = floors.get(name, 0.0)
        runs = (values[i : i + _ROWS] for i in range(0, values.size, _ROWS))
        each = [(float(np.sum(run, dtype=np.float64)), int(np.count_nonzero(run > floor))) for run in runs]
        mass, above = sum(mass for mass, _ in each), sum(count for _, count in each)
        yield name, (mass, int(values.size), above / max(1, values.size))
