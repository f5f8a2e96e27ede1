"""What compiled kernels are made of: dtypes widened to float64 and rounded back once, random draws, the language.

Every function is a Numba scalar function that LLVM inlines into a loop and vectorises. bfloat16 and float16 arrive as
uint16 bit patterns, float8 as uint8.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from mergetool.kernels.rounding import FLOAT8_VALUES

u32, u64, f32, f64 = np.uint32, np.uint64, np.float32, np.float64

F8_E4M3_VALUES = FLOAT8_VALUES["F8_E4M3"]
F8_E5M2_VALUES = FLOAT8_VALUES["F8_E5M2"]


@njit(error_model="numpy")
def where(condition, yes, no):  # type: ignore[no-untyped-def]  # noqa: D103 - as in language.py
    return yes if condition else no


@njit(error_model="numpy")
def sign(x):  # type: ignore[no-untyped-def]  # noqa: D103
    return 1.0 if x > 0.0 else (-1.0 if x < 0.0 else 0.0)


@njit(error_model="numpy")
def sqrt(x):  # type: ignore[no-untyped-def]  # noqa: D103
    return math.sqrt(x)


@njit(error_model="numpy")
def minimum(x, y):  # type: ignore[no-untyped-def]
    """A NaN stays one, as in NumPy and torch, so that it is counted and not lost."""
    return x if x < y or x != x else y


@njit(error_model="numpy")
def maximum(x, y):  # type: ignore[no-untyped-def]  # noqa: D103
    return x if x > y or x != x else y


@njit(error_model="numpy")
def widen_F64(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802 - named by dtype
    return x


@njit(error_model="numpy")
def widen_F32(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f64(x)


@njit(error_model="numpy")
def widen_BF16(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f64(u32(u32(x) << u32(16)).view(f32))


@njit(error_model="numpy")
def widen_F16(x):  # type: ignore[no-untyped-def]  # noqa: N802
    """Shift the exponent into a float32's place and scale by 2**112, which also mends subnormals."""
    bits = u32(x)
    scaled = f64(u32(u32(bits & u32(0x7FFF)) << u32(13)).view(f32)) * 5.192296858534828e33
    magnitude = (
        scaled
        if u32(bits & u32(0x7C00)) != u32(0x7C00)
        else (math.inf if u32(bits & u32(0x03FF)) == u32(0) else math.nan)
    )
    return -magnitude if u32(bits & u32(0x8000)) != u32(0) else magnitude


@njit(error_model="numpy")
def widen_F8_E4M3(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return F8_E4M3_VALUES[x]


@njit(error_model="numpy")
def widen_F8_E5M2(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return F8_E5M2_VALUES[x]


@njit(error_model="numpy")
def odd_bits(x):  # type: ignore[no-untyped-def]
    """The bits of x in float32, rounded *to odd*: a second rounding to fewer bits then comes out as if done once."""
    nearest = f32(x)
    bits = nearest.view(u32)
    error = x - f64(nearest)
    step = u32(1) if ((error > 0.0) == (x > 0.0)) else u32(0xFFFFFFFF)
    return u32(bits + (step if (error != 0.0 and u32(bits & u32(1)) == u32(0)) else u32(0)))


@njit(error_model="numpy")
def narrow_F64(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return x


@njit(error_model="numpy")
def narrow_F32(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f32(x)


@njit(error_model="numpy")
def narrow_BF16(x):  # type: ignore[no-untyped-def]  # noqa: N802
    """Round to nearest even; an overflow to infinity survives the nudge of odd_bits, because it rounds up again."""
    bits = odd_bits(x)
    rounded = u32(u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1))) >> u32(16))
    return np.uint16(u32(0x7FC0) if x != x else rounded)


@njit(error_model="numpy")
def narrow_F16(x):  # type: ignore[no-untyped-def]  # noqa: N802
    """Scale so that float16's last bit becomes the unit of a magic sum, which rounds to nearest even."""
    magnitude = abs(x)
    if magnitude != magnitude:
        return np.uint16(0x7E00)
    # the spacing of float16 numbers around x: 2**-24 below 2**-14, then 2**-10 of the leading power of two
    power = u64(f64(max(magnitude, 6.103515625e-05)).view(u64) & u64(0x7FF0000000000000)).view(f64)
    unit = power * 0.0009765625
    steps = magnitude / unit
    magic = 6755399441055744.0
    rounded = ((steps + magic) - magic) * unit  # rounds to a multiple of unit, ties to even
    if not rounded < 65520.0:  # of an infinity it is a NaN
        code = u32(0x7C00)
    elif rounded < 6.103515625e-05:
        code = u32(rounded * 16777216.0)
    else:
        bits = f32(rounded).view(u32)
        code = u32(u32(bits >> u32(13)) - u32(112 << 10))
    return np.uint16(u32(code | u32(u64(f64(x).view(u64) >> u64(63)) << u64(15))))


@njit(error_model="numpy")
def draw(key, coordinate):  # type: ignore[no-untyped-def]
    """A number in [0, 1), the same for the same key and coordinate on any machine: Philox2x32-10 (Salmon 2011)."""
    low = u32(coordinate & u64(0xFFFFFFFF))
    high = u32(u32(coordinate >> u64(32)) ^ u32(key >> u64(32)))
    turn = u32(key & u64(0xFFFFFFFF))
    for _ in range(10):
        product = u64(u64(low) * u64(0xD256D193))
        low = u32(u32(product >> u64(32)) ^ turn ^ high)
        high = u32(product & u64(0xFFFFFFFF))
        turn = u32(turn + u32(0x9E3779B9))
    return f64(low) * 2.3283064365386963e-10
