"""How generated kernels are written and called: a text filled with lines, arrays handed over as addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergetool.kernels.backend import Array, Layout

HEAD = '''"""{title}, generated from its text; do not edit."""

from mergetool.kernels.prelude import *  # noqa: F403


'''
"""How every kernel's module begins."""
KINDS = {"F64": "f64*", "F32": "f32*", "BF16": "u16*", "F16": "u16*", "F8_E4M3": "u8*", "F8_E5M2": "u8*"}
"""How the raw elements of each dtype are read."""


def tiles_of(layout: Layout) -> list[str]:
    """The kinds of all tiles that a kernel reads."""
    return [*(KINDS[dtype] for dtype in layout.inputs), *["f32*"] * (len(layout.extras) * layout.sources)]


def address(array: Array, kind: str, size: int) -> int:
    """Where an array lies, whose elements are as a kernel takes them for granted.

    Raises:
        ValueError: they are not.
    """
    wanted = np.dtype(kind[0] + str(int(kind[1:-1]) // 8))
    if array.dtype != wanted or array.size < size or not array.flags.c_contiguous:
        raise ValueError(f"a kernel takes {size} elements of {wanted} in a row, not {array.size} of {array.dtype}")
    place: int = array.__array_interface__["data"][0]
    return place


def addresses(arrays: Sequence[Array], kinds: Sequence[str], size: int) -> list[int]:
    """Where several lie, each of its own kind."""
    return [address(array, kind, size) for array, kind in zip(arrays, kinds, strict=True)]


LINE = 64
"""Bytes of a line of the cache, and of the widest vector: vectors that lie across two lines cost a quarter more."""


def flat(values: Sequence[Any]) -> list[float]:
    """Measures and parameters as a kernel takes them: their numbers one after the other."""
    return [float(each) for value in values for each in (value if isinstance(value, tuple) else (value,))]


LANES = 4096
"""Sums kept side by side, so that a vector of any width adds up the same numbers in the same order; of all terms."""


def lanes_of(terms: int) -> int:
    """The sums kept side by side of each term, which the lower half takes from the upper half in the end.

    Few enough of many terms to stay in the processor's nearest cache, or in what a block of a GPU's threads shares.
    """
    return LANES >> max(2, (terms - 1).bit_length())


def room(count: int, dtype: type[np.generic]) -> Array:
    """Memory for so many numbers that a kernel works in, from the beginning of a line of the cache on."""
    wide = np.dtype(dtype).itemsize
    raw = np.empty(count + LINE // wide, dtype)
    skipped = -raw.__array_interface__["data"][0] % LINE // wide
    return raw[skipped : skipped + count]


def filled(text: str, **parts: str | int | Sequence[str]) -> str:
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
