"""Counter-based random numbers: a key for (seed, source, tensor), a draw for each coordinate."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def key(seed: int, source: str, tensor: str) -> int:
    """The 64-bit key of one source's draws in one tensor; a hash, so it does not depend on order or process."""
    text = f"{seed}\0{source}\0{tensor}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"mergetool").digest(), "little")


def draws(key: int, start: int, stop: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for coordinates ``start`` to ``stop``: Philox2x32-10 (Salmon et al., SC 2011).

    The counter is half the coordinate, its upper word crossed with the upper half of the key; the lower half is the
    generator's key. An even coordinate takes the first of the two words that come out, an odd one the second; divided
    by 2**32 it is the draw.
    """
    pair = np.arange(start >> 1, (stop + 1) >> 1, dtype=np.uint64)
    low = pair & np.uint64(0xFFFFFFFF)
    high = (pair >> np.uint64(32)) ^ np.uint64(key >> 32)
    turn = key & 0xFFFFFFFF
    for _ in range(10):
        product = low * np.uint64(0xD256D193)
        low = (product >> np.uint64(32)) ^ np.uint64(turn) ^ high
        high = product & np.uint64(0xFFFFFFFF)
        turn = (turn + 0x9E3779B9) & 0xFFFFFFFF
    words = np.stack([low, high], axis=1).reshape(-1)
    return words[start & 1 :][: stop - start].astype(np.float64) * 2.0**-32
