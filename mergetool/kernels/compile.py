"""Coordinate texts compiled for the CPU: one loop over a tile that widens, computes in float64 and rounds once.

A kernel is a small generated module that is kept beside its machine code; read one to see exactly what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mergetool.kernels.backend import BLOCK, Array, Layout, measure_names
from mergetool.kernels.calling import HEAD, KINDS, address, addresses, filled, flat, lanes_of, room, tiles_of
from mergetool.kernels.magnitudes import above, between
from mergetool.kernels.objects import Entry, entry, once, ready
from mergetool.kernels.text import called, plain

__all__ = ["above", "between", "combine", "matrices", "ready", "sums"]

PIECE = 2048
"""Coordinates for which random numbers are drawn at once, so that they stay in the nearest cache."""
matrices = "cpu"
"""Where whole matrices are solved."""
WORDS = PIECE // 2 + 8
"""Room for the pairs of draws that a run of PIECE coordinates touches, one more than half if it begins with the second
of a pair; whole lines of the cache."""


def _functions(function: Callable[..., Any], count: int, keep: tuple[str, ...] | None) -> str:
    parts = []
    for name, value in dict(called(function)).items():
        parts.append(f"{name} = {value!r}\n" if isinstance(value, int | float) else _compiled(plain(value, count)))
    return "\n".join([*parts, _compiled(plain(function, count, keep)), f"text_ = {function.__code__.co_name}\n"])


def _compiled(source: str) -> str:
    return f'@njit(error_model="numpy", forceinline=True)\n{source}\n'


def _load_inputs(layout: Layout, tensors: tuple[str, ...]) -> list[str]:
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
        draws = [f"unit(words[{2 * WORDS * i} + skip + k - first])" for i in range(layout.sources)]
        lines.append(f"chance = ({', '.join(draws)},)")
    for n, name in enumerate(layout.extras):
        places = [len(layout.inputs) + n * layout.sources + i for i in range(layout.sources)]
        lines.append(f"e{n} = ({', '.join(f'widen_F32(x{i}[k])' for i in places)},)  # {name}")
    return lines


def _call(layout: Layout, tensors: tuple[str, ...], arguments: tuple[str, ...]) -> str:
    """What the text is called with: measures and parameters by number, so that no name of theirs meets one of ours."""
    numbered = {name: f"p{i}" for i, name in enumerate((*measure_names(tensors, layout.extras), *arguments))}
    numbered |= {name: f"e{n}" for n, name in enumerate(layout.extras)}
    return ", ".join(numbered.get(name, name) for name in (*tensors, *arguments))


DRAWS = """
skip = (start + first) & 1
for j in range((skip + last - first + 1) >> 1):
    coordinate = u64(((start + first) >> 1) + j)
    {draws}
"""


def _draws(layout: Layout, tensors: tuple[str, ...]) -> list[str]:
    """Lines that draw the random numbers of the coordinates from ``first`` to ``last``."""
    if "chance" not in tensors:
        return []
    draws = [f"pairs[{WORDS * i} + j] = draw(keys[{i}], coordinate)" for i in range(layout.sources)]
    return DRAWS.format(draws="\n    ".join(draws)).strip().split("\n")


Kind = type | tuple[type, ...]


def _kind(value: Any) -> Kind:
    """What a number is, or each of several."""
    if isinstance(value, tuple):
        return tuple(_one(each) for each in value)
    return _one(value)


def _one(value: Any) -> type:
    if isinstance(value, bool | np.bool_):
        return bool
    return int if isinstance(value, int | np.integer) else float


def _numbers(names: Sequence[str], kinds: Sequence[Kind]) -> Iterator[str]:
    """Lines that give every measure and parameter of a text its value; all of them come as float64."""
    how = {float: "numbers[{}]", int: "i64(numbers[{}])", bool: "numbers[{}] != 0.0"}
    place = 0
    for n, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        several = kind if isinstance(kind, tuple) else (kind,)
        values = [how[each].format(place + i) for i, each in enumerate(several)]
        place += len(several)
        value = f"({', '.join(values)},)" if isinstance(kind, tuple) else values[0]
        yield f"p{n} = {value}  # {name}"


COMBINE = """
def kernel(start, size, {tiles}, out, keys, pairs, words, numbers):
    {numbers}
    bad = u32(0)
    for first in range(0, size, {piece}):
        last = first + {piece} if first + {piece} < size else size
        {draws}
        for k in range(first, last):
            {load}
            result = narrow_{output}(text_({call}))
            out[k] = result
            bad = u32(bad + u32({strange}))
    return i64(bad)
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
    tiles, out_kind = tiles_of(layout), KINDS[layout.output]

    @once
    def compiled(kinds: tuple[Kind, ...]) -> Entry:
        text = _combine_text(function, tensors, arguments, layout, kinds)
        parameters = ["i64", "i64", *tiles, out_kind, "u64*", "u64*", "u32*", "f64*"]
        return entry(function.__name__, text, parameters)

    def run(start: int, inputs: Sequence[Array], out: Array, keys: Sequence[Any], *rest: Any) -> int:
        kernel = compiled(tuple(_kind(value) for value in rest))
        numbers, drawn = np.array(flat(rest), np.float64), _Drawn(layout, tensors, keys)
        places = addresses(inputs, tiles, out.size)
        return kernel(start, out.size, *places, address(out, out_kind, 0), *drawn.places, address(numbers, "f64*", 0))

    return run


def _combine_text(
    function: Callable[..., Any],
    tensors: tuple[str, ...],
    arguments: tuple[str, ...],
    layout: Layout,
    kinds: Sequence[Kind],
) -> str:
    strange = [f"strange_{layout.output}(result)", *(f"strange_{d}(x{i}[k])" for i, d in enumerate(layout.inputs))]
    text = HEAD.format(title=function.__name__) + _functions(function, layout.sources, arguments)
    return text + filled(
        COMBINE,
        tiles=", ".join(f"x{i}" for i in range(len(tiles_of(layout)))),
        numbers=tuple(_numbers((*measure_names(tensors, layout.extras), *arguments), kinds)),
        piece=PIECE if "chance" in tensors else BLOCK,
        draws=_draws(layout, tensors),
        load=_load_inputs(layout, tensors),
        call=_call(layout, tensors, arguments),
        output=layout.output,
        strange=" | ".join(strange),
    )


class _Drawn:
    """Random keys, and room for the numbers that a kernel draws with them."""

    def __init__(self, layout: Layout, tensors: tuple[str, ...], keys: Sequence[Any]) -> None:
        self._keys = np.array(keys, np.uint64)
        self._room = room(layout.sources * WORDS if "chance" in tensors else 0, np.uint64)

    @property
    def places(self) -> tuple[int, int, int]:
        """The keys; the room by pairs of draws, and the same room by draws."""
        place = address(self._room, "u64*", 0)
        return address(self._keys, "u64*", 0), place, place


SUMS = """
def kernel(start, size, {tiles}, partial, lanes, keys, pairs, words, numbers):
    {numbers}
    for block in range((size + {block} - 1) // {block}):
        for k in range({terms} * {stride}):
            lanes[k] = 0.0
        end = (block + 1) * {block} if (block + 1) * {block} < size else size
        for first in range(block * {block}, end, {lanes}):
            last = first + {lanes} if first + {lanes} < end else end
            {draws}
            for k in range(first, last):
                {load}
                terms = text_({call})
                {add}
        for i in range({terms}):
            half = {lanes} >> 1
            while half > 0:
                for k in range(half):
                    lanes[i * {stride} + k] += lanes[i * {stride} + half + k]
                half >>= 1
            partial[block * {terms} + i] = lanes[i * {stride}]
    return 0
"""
APART = 72
"""Numbers between the sums of one term and the next's: processors take places a page apart for the same for a while."""


@once
def sums(
    function: Callable[..., Any], tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, terms: int
) -> Callable[..., None]:
    """Compile a text that returns ``terms`` numbers to ``sums(start, inputs, partial, keys, *arguments)``.

    The kernel fills ``partial``, float64 of shape [blocks, terms], with the sums over each :data:`BLOCK` of the tile.
    """
    tiles = tiles_of(layout)
    lanes = lanes_of(terms)
    stride = lanes + APART

    @once
    def compiled(kinds: tuple[Kind, ...]) -> Entry:
        text = HEAD.format(title=function.__name__) + _functions(function, layout.sources, arguments)
        text += filled(
            SUMS,
            tiles=", ".join(f"x{i}" for i in range(len(tiles))),
            numbers=tuple(_numbers(arguments, kinds)),
            terms=terms,
            lanes=lanes,
            stride=stride,
            block=BLOCK,
            draws=_draws(layout, tensors),
            load=_load_inputs(layout, tensors),
            call=_call(layout, tensors, arguments),
            add=[f"lanes[{i * stride} + k - first] += terms[{i}]" for i in range(terms)],
        )
        return entry(function.__name__, text, ["i64", "i64", *tiles, "f64*", "f64*", "u64*", "u64*", "u32*", "f64*"])

    def run(start: int, inputs: Sequence[Array], partial: Array, keys: Sequence[Any], *values: Any) -> None:
        kernel = compiled(tuple(_kind(value) for value in values))
        size, numbers, drawn = inputs[0].size, np.array(flat(values), np.float64), _Drawn(layout, tensors, keys)
        side = room(terms * stride, np.float64)
        result = address(partial, "f64*", -(-size // BLOCK) * terms), address(side, "f64*", 0)
        places = addresses(inputs, tiles, size)
        kernel(start, size, *places, *result, *drawn.places, address(numbers, "f64*", 0))

    return run
