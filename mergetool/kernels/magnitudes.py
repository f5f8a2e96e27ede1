"""Kernels that look at the magnitudes of deltas: how many reach a threshold, and which lie between two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mergetool.kernels.backend import THRESHOLDS, Array, Layout
from mergetool.kernels.calling import HEAD, address, addresses, filled, tiles_of
from mergetool.kernels.objects import entry, once

ABOVE = """
def kernel(size, {tiles}, thresholds, counts):
    for start in range(0, size, {piece}):
        stop = start + {piece} if start + {piece} < size else size
        {sources}
    return 0
"""
ABOVE_SOURCE = """
{zero}
{cuts}
for k in range(start, stop):
    bits = {bits}
    {count}
{add}
"""
BETWEEN = """
def kernel(size, room, {tiles}, low, high, found, used):
    {sources}
    return 0
"""
BETWEEN_SOURCE = """
lowest = low[{j}]
width = u32(high[{j}] - lowest)
taken = used[{j}]
for start in range(0, size, {piece}):
    stop = start + {piece} if start + {piece} < size else size
    hits = u32(0)
    for k in range(start, stop):
        bits = {bits}
        hits = u32(hits + u32(u32(bits - lowest) < width))
    if hits > u32(0):
        for k in range(start, stop):
            bits = {bits}
            if u32(bits - lowest) < width and taken < room:
                found[{j} * room + taken] = bits
                taken += 1
used[{j}] = taken
"""


def _magnitude(layout: Layout, source: int) -> str:
    """The bits of a delta's magnitude as float32.

    The difference of two floats that float32 holds is the same whether it is rounded to float32 at once or by way
    of float64, whose rounding never lands half-way between two float32; so only float64 inputs need the detour.
    """
    pair = layout.inputs[source], layout.inputs[0]
    load = "widen" if "F64" in pair else "single"
    return f"f32(abs({load}_{pair[0]}(x{source}[k]) - {load}_{pair[1]}(x0[k]))).view(u32)"


@once
def above(layout: Layout, count: int = THRESHOLDS) -> Callable[..., None]:
    """Compile ``above(inputs, thresholds, counts)``: as :meth:`mergetool.kernels.backend.Backend.above`."""
    cuts = range(count)
    lines: list[str] = []
    for i in range(1, len(layout.inputs)):
        lines += filled(
            ABOVE_SOURCE.strip(),
            zero="; ".join(f"c{n} = u32(0)" for n in cuts),
            cuts="; ".join(f"t{n} = thresholds[{(i - 1) * count + n}]" for n in cuts),
            bits=_magnitude(layout, i),
            count=[f"c{n} = u32(c{n} + u32(bits >= t{n}))" for n in cuts],
            add="; ".join(f"counts[{(i - 1) * count + n}] += c{n}" for n in cuts),
        ).split("\n")
    tiles = tiles_of(layout)
    named = ", ".join(f"x{i}" for i in range(len(tiles)))
    text = HEAD.format(title="above") + filled(ABOVE, tiles=named, piece=4096, sources=lines)
    kernel = entry("above", text, ["i64", *tiles, "u32*", "i64*"])

    def run(inputs: Sequence[Array], thresholds: Array, counts: Array) -> None:
        size, wide, given = inputs[0].size, layout.sources * count, np.ascontiguousarray(thresholds)
        places = addresses(inputs, tiles, size)
        kernel(size, *places, address(given, "u32*", wide), address(counts, "i64*", wide))

    return run


@once
def between(layout: Layout) -> Callable[..., None]:
    """Compile ``between(inputs, low, high, found, used)``: as :meth:`mergetool.kernels.backend.Backend.between`."""
    lines: list[str] = []
    for i in range(1, len(layout.inputs)):
        lines += filled(BETWEEN_SOURCE.strip(), j=i - 1, piece=64, bits=_magnitude(layout, i)).split("\n")
    tiles = tiles_of(layout)
    named = ", ".join(f"x{i}" for i in range(len(tiles)))
    text = HEAD.format(title="between") + filled(BETWEEN, tiles=named, sources=lines)
    kernel = entry("between", text, ["i64", "i64", *tiles, "u32*", "u32*", "u32*", "i64*"])

    def run(inputs: Sequence[Array], low: Array, high: Array, found: Array, used: Array) -> None:
        size, count, room = inputs[0].size, layout.sources, found.shape[1]
        bounds = address(low, "u32*", count), address(high, "u32*", count)
        places = address(found, "u32*", count * room), address(used, "i64*", count)
        kernel(size, room, *addresses(inputs, tiles, size), *bounds, *places)

    return run
