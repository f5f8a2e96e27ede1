"""How much a header of a size may hold: counted before it is parsed, so that none takes more than one full of tensors.

An empty object is two bytes on disk and sixty in memory. What a tensor needs sets the bounds: its entry has 46 bytes
and a name. So a header that passes takes about ten times its size while it is parsed, as one full of tensors does.
"""

from __future__ import annotations

import numpy as np

from mergetool.errors import HeaderError

FREE = 1 << 16
"""So many of anything are never too many; what is wrong with a small header is told by what reads it."""
_BLOCK = 1 << 20
_QUOTE = ord('"')
_ENTRY, _KEY, _VALUE = 40, 32, 6
"""The least bytes on the average for each object, for each key of what is no entry, and for each value of a list."""


def refuse_dense(raw_json: bytes | bytearray, where: str) -> None:
    """Refuse a header that holds more objects, lists, keys or values than one of its size can need.

    Args:
        raw_json: the JSON.
        where: the path, for messages.

    Raises:
        HeaderError: it does.
    """
    size = len(raw_json)
    if not _too_many({mark: raw_json.count(mark) for mark in b"{[:,"}, size):
        return
    # Strings may hold any of them, as metadata that is JSON itself does.
    found = outside_strings(raw_json)
    if what := _too_many(found, size):
        what = f"is not a safetensors file: its header of {size:,} bytes holds {what}, more than tensors need"
        raise HeaderError(what, where, "download it again, or check that the file is what its name says")


def _too_many(counts: dict[int, int], size: int) -> str:
    """What there is too much of, in words."""
    objects, lists, keys, commas = (counts[mark] for mark in b"{[:,")
    others = keys - 3 * objects
    for count, least, name in (
        (objects, _ENTRY, "objects"),
        (lists, _ENTRY // 2, "lists"),
        (others, _KEY, "keys"),
        (commas, _VALUE, "values"),
    ):
        if count > FREE + size // least:
            return f"{count:,} {name}"
    return ""


def outside_strings(raw_json: bytes | bytearray) -> dict[int, int]:
    """How often each mark of structure stands outside strings."""
    if b"\\" in raw_json:
        raw_json = raw_json.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    counts = dict.fromkeys(b"{[:,", 0)
    inside = 0
    for start in range(0, len(raw_json), _BLOCK):
        block = np.frombuffer(raw_json, np.uint8, min(_BLOCK, len(raw_json) - start), start)
        # The parity of the quotes so far; sums of bytes keep it when they overflow.
        within = (np.cumsum(block == _QUOTE, dtype=np.uint8) + np.uint8(inside)) & 1
        outside = block[within == 0]
        for mark in counts:
            counts[mark] += int(np.count_nonzero(outside == mark))
        inside = int(within[-1])
    return counts
