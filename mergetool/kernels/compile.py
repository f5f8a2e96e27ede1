"""Coordinate texts compiled for the CPU: one loop over a tile that widens, computes in float64 and rounds once.

A kernel is a small generated module, kept in a cache folder under a name made from its content, so that Numba's own
cache of machine code stays valid as long as the text does. Read one to see exactly what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mergetool.kernels.backend import BLOCK, THRESHOLDS, Layout, measure_names
from mergetool.kernels.generated import module, once
from mergetool.kernels.text import called, plain

HEAD = '''"""{title}, generated from its text; do not edit."""

from mergetool.kernels.prelude import *  # noqa: F403


'''


def _functions(function: Callable[..., Any], count: int, keep: tuple[str, ...] | None) -> str:
    parts = []
    for name, value in dict(called(function)).items():
        parts.append(f"{name} = {value!r}\n" if isinstance(value, int | float) else _compiled(plain(value, count)))
    return "\n".join([*parts, _compiled(plain(function, count, keep))])


def _compiled(source: str) -> str:
    return f'@njit(error_model="numpy", forceinline=True)\n{source}\n'


def _load_inputs(layout: Layout, tensors: tuple[str, ...], start: str = "start") -> list[str]:
    """Lines that give every tensor argument of the text its value at coordinate k."""
    first = int(layout.base)
    lines = [f"w{i} = widen_{dtype}(x{i}[k])" for i, dtype in enumerate(layout.inputs)]
    values = [f"w{i}" for i in range(first, len(layout.inputs))]
    if layout.base:
        lines.append("base = w0")
    if "value" in tensors:
        lines.append(f"value = ({', '.join(values)},)")
    if "delta" in tensors:
        lines.append(f"delta = ({', '.join(f'{v} - w0' for v in values)},)")
    if "chance" in tensors:
        draws = [f"draw(keys[{i}], u64({start} + k))" for i in range(layout.sources)]
        lines.append(f"chance = ({', '.join(draws)},)")
    for n, name in enumerate(layout.extras):
        places = [len(layout.inputs) + n * layout.sources + i for i in range(layout.sources)]
        lines.append(f"{name} = ({', '.join(f'widen_F32(x{i}[k])' for i in places)},)")
    return lines


def _unpack(layout: Layout) -> str:
    count = len(layout.inputs) + len(layout.extras) * layout.sources
    return f"{', '.join(f'x{i}' for i in range(count))}, = inputs"


READY = """
@njit(nogil=True, cache=True, error_model="numpy")
def ready(x):
    return widen_BF16(x)
"""


@once
def ready() -> None:
    """Load Numba and what it takes to run any kernel: half a second."""
    module("ready", HEAD.format(title="ready") + READY).ready(np.uint16(0))


COMBINE = """
@njit(nogil=True, cache=True, error_model="numpy")
def combine(start, inputs, out, keys, {arguments}):
    {unpack}
    bad = u32(0)
    for k in range(out.size):
        {load}
        result = narrow_{output}({name}({call}))
        out[k] = result
        bad = u32(bad + u32({strange}))
    return bad
"""


@once
def combine(
    function: Callable[..., Any], tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout
) -> Callable[..., int]:
    """Compile a method's text to ``combine(start, inputs, out, keys, *measures, *arguments) -> non-finite``.

    The kernel fills ``out`` from the ``inputs`` (raw tiles of equal length, the base first), where ``start`` is the
    tile's first coordinate in its tensor, and counts the coordinates at which an input or the result is not finite.

    Args:
        function: the text; ``tensors`` are its positional arguments.
        tensors: of these, all but base, value, delta and chance are measures: tuples with one float for each source.
        arguments: the parameters the text uses, scalars or tuples with one value for each source.
        layout: the dtypes.
    """
    measures = measure_names(tensors, layout.extras)
    text = HEAD.format(title=function.__name__) + _functions(function, layout.sources, arguments)
    text += COMBINE.format(
        arguments=", ".join((*measures, *arguments)),
        unpack=_unpack(layout),
        load="\n        ".join(_load_inputs(layout, tensors)),
        name=function.__name__,
        call=", ".join((*tensors, *arguments)),
        output=layout.output,
        strange=" | ".join(
            [f"strange_{layout.output}(result)", *(f"strange_{d}(x{i}[k])" for i, d in enumerate(layout.inputs))]
        ),
    )
    kernel: Callable[..., int] = module(function.__name__, text).combine
    return kernel


SUMS = """
@njit(nogil=True, cache=True, error_model="numpy")
def sums(start, inputs, partial, keys, {arguments}):
    lanes = np.empty(({terms}, {lanes}))
    for block in range(partial.shape[0]):
        lanes[:] = 0.0
        for piece in range(block * {block}, min((block + 1) * {block}, inputs[0].size), {lanes}):
            {pieces}
            start_piece = start + piece
            for k in range(x0.size):
                {load}
                terms = {name}({call})
                {add}
        for i in range({terms}):
            partial[block, i] = lanes[i].sum()
"""
LANES = 4096
"""Sums kept side by side, so that a vector of any width adds up the same numbers in the same order; of all terms."""


@once
def sums(
    function: Callable[..., Any], tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, terms: int
) -> Callable[..., None]:
    """Compile a text that returns ``terms`` numbers to ``sums(start, inputs, partial, keys, *arguments)``.

    The kernel fills ``partial``, float64 of shape [blocks, terms], with the sums over each :data:`BLOCK` of the tile.
    """
    lanes = LANES >> max(2, (terms - 1).bit_length())  # few enough of many terms to stay in the nearest cache
    text = HEAD.format(title=function.__name__) + _functions(function, layout.sources, arguments)
    text += SUMS.format(
        arguments=", ".join(arguments),
        terms=terms,
        lanes=lanes,
        block=BLOCK,
        pieces="; ".join(f"x{i} = inputs[{i}][piece : piece + {lanes}]" for i in range(len(layout.inputs))),
        load="\n                ".join(_load_inputs(layout, tensors, "start_piece")),
        name=function.__name__,
        call=", ".join((*tensors, *arguments)),
        add="\n                ".join(f"lanes[{i}, k] += terms[{i}]" for i in range(terms)),
    )
    kernel: Callable[..., None] = module(function.__name__, text).sums
    return kernel


ABOVE = """
@njit(nogil=True, cache=True, error_model="numpy")
def above(inputs, thresholds, counts):
    {unpack}
    for start in range(0, x0.size, {piece}):
        base = x0[start:start + {piece}]
{sources}
"""
ABOVE_SOURCE = """
        value = x{i}[start:start + {piece}]
        {zero}
        {cuts}
        for k in range(value.size):
            bits = {bits}
            {count}
        {add}
"""
BETWEEN = """
@njit(nogil=True, cache=True, error_model="numpy")
def between(inputs, low, high, found, used):
    {unpack}
    room = found.shape[1]
{sources}
"""
BETWEEN_SOURCE = """
    lowest = low[{j}]
    width = u32(high[{j}] - lowest)
    taken = used[{j}]
    for start in range(0, x0.size, {piece}):
        base = x0[start:start + {piece}]
        value = x{i}[start:start + {piece}]
        hits = u32(0)
        for k in range(value.size):
            bits = {bits}
            hits = u32(hits + u32(u32(bits - lowest) < width))
        if hits > u32(0):
            for k in range(value.size):
                bits = {bits}
                if u32(bits - lowest) < width and taken < room:
                    found[{j}, taken] = bits
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
    return f"f32(abs({load}_{pair[0]}(value[k]) - {load}_{pair[1]}(base[k]))).view(u32)"


@once
def above(layout: Layout, count: int = THRESHOLDS) -> Callable[..., None]:
    """Compile ``above(inputs, thresholds, counts)``: as :meth:`mergetool.kernels.backend.Backend.above`."""
    cuts = range(count)
    sources = "".join(
        ABOVE_SOURCE.format(
            i=i,
            piece=4096,
            zero="; ".join(f"c{n} = u32(0)" for n in cuts),
            cuts="; ".join(f"t{n} = thresholds[{i - 1}, {n}]" for n in cuts),
            bits=_magnitude(layout, i),
            count="\n            ".join(f"c{n} = u32(c{n} + u32(bits >= t{n}))" for n in cuts),
            add="; ".join(f"counts[{i - 1}, {n}] += c{n}" for n in cuts),
        )
        for i in range(1, len(layout.inputs))
    )
    text = HEAD.format(title="above") + ABOVE.format(unpack=_unpack(layout), piece=4096, sources=sources)
    kernel: Callable[..., None] = module("above", text).above
    return kernel


@once
def between(layout: Layout) -> Callable[..., None]:
    """Compile ``between(inputs, low, high, found, used)``: as :meth:`mergetool.kernels.backend.Backend.between`."""
    sources = "".join(
        BETWEEN_SOURCE.format(i=i, j=i - 1, piece=64, bits=_magnitude(layout, i)) for i in range(1, len(layout.inputs))
    )
    text = HEAD.format(title="between") + BETWEEN.format(unpack=_unpack(layout), sources=sources)
    kernel: Callable[..., None] = module("between", text).between
    return kernel
