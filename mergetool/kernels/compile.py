"""Coordinate texts compiled for the CPU: one loop over a tile that widens, computes in float64 and rounds once.

A kernel is a small generated module that is kept beside its machine code; read one to see exactly what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mergetool.kernels.backend import BLOCK, THRESHOLDS, Array, Layout, measure_names
from mergetool.kernels.objects import Entry, entry, once, ready
from mergetool.kernels.text import called, plain

__all__ = ["above", "between", "combine", "ready", "sums"]

HEAD = '''"""{title}, generated from its text; do not edit."""

from mergetool.kernels.prelude import *  # noqa: F403


'''
KINDS = {"F64": "f64*", "F32": "f32*", "BF16": "u16*", "F16": "u16*", "F8_E4M3": "u8*", "F8_E5M2": "u8*"}
"""How the raw elements of each dtype are read."""
PIECE = 2048
"""Coordinates for which random numbers are drawn at once, so that they stay in the nearest cache."""
WORDS = PIECE // 2 + 1
"""Pairs of draws that a run of PIECE coordinates may touch: one more if it begins with the second of a pair."""


def _functions(function: Callable[..., Any], count: int, keep: tuple[str, ...] | None) -> str:
    parts = []
    for name, value in dict(called(function)).items():
        parts.append(f"{name} = {value!r}\n" if isinstance(value, int | float) else _compiled(plain(value, count)))
    return "\n".join([*parts, _compiled(plain(function, count, keep)), f"text_ = {function.__code__.co_name}\n"])


def _compiled(source: str) -> str:
    return f'@njit(error_model="numpy", forceinline=True)\n{source}\n'


def _tiles(layout: Layout) -> list[str]:
    """The kinds of all tiles that a kernel reads."""
    return [*(KINDS[dtype] for dtype in layout.inputs), *["f32*"] * (len(layout.extras) * layout.sources)]


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


def _flat(values: Sequence[Any]) -> Array:
    """Numbers as a kernel takes them."""
    flat = [each for value in values for each in (value if isinstance(value, tuple) else (value,))]
    return np.array(flat, np.float64)


def _address(array: Array, kind: str, size: int) -> int:
    """Where an array lies, whose elements are as a kernel takes them for granted.

    Raises:
        ValueError: they are not.
    """
    wanted = np.dtype(kind[0] + str(int(kind[1:-1]) // 8))
    if array.dtype != wanted or array.size < size or not array.flags.c_contiguous:
        raise ValueError(f"a kernel takes {size} elements of {wanted} in a row, not {array.size} of {array.dtype}")
    place: int = array.__array_interface__["data"][0]
    return place


def _addresses(arrays: Sequence[Array], kinds: Sequence[str], size: int) -> list[int]:
    return [_address(array, kind, size) for array, kind in zip(arrays, kinds, strict=True)]


def _write(text: str, **parts: str | int | Sequence[str]) -> str:
    """Fill a text; a part that is several lines stands alone on its own, whose indentation all of them get."""
    lines = []
    for line in text.split("\n"):
        name = line.strip().removeprefix("{").removesuffix("}")
        part = parts.get(name) if line.strip() == f"{{{name}}}" else None
        if part is None or isinstance(part, str | int):
            lines.append(line.format(**parts) if "{" in line else line)
        else:
            lines += [line[: len(line) - len(line.lstrip())] + each for each in part]
    return "\n".join(lines)


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
    tiles, out_kind = _tiles(layout), KINDS[layout.output]

    @once
    def compiled(kinds: tuple[Kind, ...]) -> Entry:
        text = _combine_text(function, tensors, arguments, layout, kinds)
        parameters = ["i64", "i64", *tiles, out_kind, "u64*", "u64*", "u32*", "f64*"]
        return entry(function.__name__, text, parameters)

    def run(start: int, inputs: Sequence[Array], out: Array, keys: Sequence[Any], *rest: Any) -> int:
        kernel = compiled(tuple(_kind(value) for value in rest))
        numbers, drawn = _flat(rest), _Drawn(layout, tensors, keys)
        places = _addresses(inputs, tiles, out.size)
        return kernel(start, out.size, *places, _address(out, out_kind, 0), *drawn.places, _address(numbers, "f64*", 0))

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
    return text + _write(
        COMBINE,
        tiles=", ".join(f"x{i}" for i in range(len(_tiles(layout)))),
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
        self._room = np.empty(layout.sources * WORDS if "chance" in tensors else 0, np.uint64)

    @property
    def places(self) -> tuple[int, int, int]:
        """The keys; the room by pairs of draws, and the same room by draws."""
        room = _address(self._room, "u64*", 0)
        return _address(self._keys, "u64*", 0), room, room


SUMS = """
def kernel(start, size, {tiles}, partial, lanes, keys, pairs, words, numbers):
    {numbers}
    for block in range((size + {block} - 1) // {block}):
        for k in range({terms} * {lanes}):
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
                    lanes[i * {lanes} + k] += lanes[i * {lanes} + half + k]
                half >>= 1
            partial[block * {terms} + i] = lanes[i * {lanes}]
    return 0
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
    tiles = _tiles(layout)
    lanes = LANES >> max(2, (terms - 1).bit_length())  # few enough of many terms to stay in the nearest cache

    @once
    def compiled(kinds: tuple[Kind, ...]) -> Entry:
        text = HEAD.format(title=function.__name__) + _functions(function, layout.sources, arguments)
        text += _write(
            SUMS,
            tiles=", ".join(f"x{i}" for i in range(len(tiles))),
            numbers=tuple(_numbers(arguments, kinds)),
            terms=terms,
            lanes=lanes,
            block=BLOCK,
            draws=_draws(layout, tensors),
            load=_load_inputs(layout, tensors),
            call=_call(layout, tensors, arguments),
            add=[f"lanes[{i * lanes} + k - first] += terms[{i}]" for i in range(terms)],
        )
        return entry(function.__name__, text, ["i64", "i64", *tiles, "f64*", "f64*", "u64*", "u64*", "u32*", "f64*"])

    def run(start: int, inputs: Sequence[Array], partial: Array, keys: Sequence[Any], *values: Any) -> None:
        kernel = compiled(tuple(_kind(value) for value in values))
        size, numbers, drawn = inputs[0].size, _flat(values), _Drawn(layout, tensors, keys)
        side = np.empty(terms * lanes)
        result = _address(partial, "f64*", -(-size // BLOCK) * terms), _address(side, "f64*", 0)
        places = _addresses(inputs, tiles, size)
        kernel(start, size, *places, *result, *drawn.places, _address(numbers, "f64*", 0))

    return run


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
        lines += _write(
            ABOVE_SOURCE.strip(),
            zero="; ".join(f"c{n} = u32(0)" for n in cuts),
            cuts="; ".join(f"t{n} = thresholds[{(i - 1) * count + n}]" for n in cuts),
            bits=_magnitude(layout, i),
            count=[f"c{n} = u32(c{n} + u32(bits >= t{n}))" for n in cuts],
            add="; ".join(f"counts[{(i - 1) * count + n}] += c{n}" for n in cuts),
        ).split("\n")
    tiles = _tiles(layout)
    named = ", ".join(f"x{i}" for i in range(len(tiles)))
    text = HEAD.format(title="above") + _write(ABOVE, tiles=named, piece=4096, sources=lines)
    kernel = entry("above", text, ["i64", *tiles, "u32*", "i64*"])

    def run(inputs: Sequence[Array], thresholds: Array, counts: Array) -> None:
        size, wide, given = inputs[0].size, layout.sources * count, np.ascontiguousarray(thresholds)
        places = _addresses(inputs, tiles, size)
        kernel(size, *places, _address(given, "u32*", wide), _address(counts, "i64*", wide))

    return run


@once
def between(layout: Layout) -> Callable[..., None]:
    """Compile ``between(inputs, low, high, found, used)``: as :meth:`mergetool.kernels.backend.Backend.between`."""
    lines: list[str] = []
    for i in range(1, len(layout.inputs)):
        filled = _write(BETWEEN_SOURCE.strip(), j=i - 1, piece=64, bits=_magnitude(layout, i))
        lines += filled.split("\n")
    tiles = _tiles(layout)
    named = ", ".join(f"x{i}" for i in range(len(tiles)))
    text = HEAD.format(title="between") + _write(BETWEEN, tiles=named, sources=lines)
    kernel = entry("between", text, ["i64", "i64", *tiles, "u32*", "u32*", "u32*", "i64*"])

    def run(inputs: Sequence[Array], low: Array, high: Array, found: Array, used: Array) -> None:
        size, count, room = inputs[0].size, layout.sources, found.shape[1]
        bounds = _address(low, "u32*", count), _address(high, "u32*", count)
        places = _address(found, "u32*", count * room), _address(used, "i64*", count)
        kernel(size, room, *_addresses(inputs, tiles, size), *bounds, *places)

    return run
