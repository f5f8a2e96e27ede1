"""What compiled kernels are made of: dtypes widened to float64 and rounded back once, random draws, the language.

Every function is a Numba scalar function that LLVM inlines into a loop and vectorises. bfloat16 and float16 arrive as
uint16 bit patterns, float8 as uint8. ``strange`` tells a NaN or an infinity by its raw bits.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from mergetool.kernels.rounding import FLOAT8_VALUES

u32, u64, f32, f64, i64 = np.uint32, np.uint64, np.float32, np.float64, np.int64

F8_E4M3_VALUES = FLOAT8_VALUES["F8_E4M3"]
F8_E5M2_VALUES = FLOAT8_VALUES["F8_E5M2"]


@njit(error_model="numpy", forceinline=True)
def where(condition, yes, no):  # type: ignore[no-untyped-def]  # noqa: D103 - as in language.py
    return yes if condition else no


@njit(error_model="numpy", forceinline=True)
def sign(x):  # type: ignore[no-untyped-def]  # noqa: D103
    return 1.0 if x > 0.0 else (-1.0 if x < 0.0 else 0.0)


@njit(error_model="numpy", forceinline=True)
def sqrt(x):  # type: ignore[no-untyped-def]  # noqa: D103
    return math.sqrt(x)


@njit(error_model="numpy", forceinline=True)
def minimum(x, y):  # type: ignore[no-untyped-def]
    """A NaN stays one, as in NumPy and torch, so that it is counted and not lost."""
    return x if x < y or x != x else y


@njit(error_model="numpy", forceinline=True)
def maximum(x, y):  # type: ignore[no-untyped-def]  # noqa: D103
    return x if x > y or x != x else y


@njit(error_model="numpy", forceinline=True)
def widen_F64(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802 - named by dtype
    return x


@njit(error_model="numpy", forceinline=True)
def widen_F32(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f64(x)


@njit(error_model="numpy", forceinline=True)
def widen_BF16(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f64(u32(u32(x) << u32(16)).view(f32))


@njit(error_model="numpy", forceinline=True)
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


@njit(error_model="numpy", forceinline=True)
def widen_F8_E4M3(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return F8_E4M3_VALUES[x]


@njit(error_model="numpy", forceinline=True)
def widen_F8_E5M2(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return F8_E5M2_VALUES[x]


@njit(error_model="numpy", forceinline=True)
def single_F32(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return x


@njit(error_model="numpy", forceinline=True)
def single_BF16(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return u32(u32(x) << u32(16)).view(f32)


@njit(error_model="numpy", forceinline=True)
def single_F16(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f32(widen_F16(x))


@njit(error_model="numpy", forceinline=True)
def single_F8_E4M3(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f32(F8_E4M3_VALUES[x])


@njit(error_model="numpy", forceinline=True)
def single_F8_E5M2(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f32(F8_E5M2_VALUES[x])


@njit(error_model="numpy", forceinline=True)
def rounded(x, digits, lowest, highest):  # type: ignore[no-untyped-def]
    """Round the magnitude of x to fewer significant bits, once and to nearest even, subnormals included.

    Adding and taking away a power of two, 2**digits times that of x, leaves a multiple of the wanted unit.
    ``lowest`` and ``highest`` are the exponents between which the unit follows x, as float64 bits.
    """
    bits = f64(x).view(u64)
    exponent = min(max(u64(bits & u64(0x7FF0000000000000)), lowest), highest)
    power = u64(exponent + u64(digits << 52)).view(f64)
    return (abs(x) + power) - power


@njit(error_model="numpy", forceinline=True)
def sign_bit(x):  # type: ignore[no-untyped-def]
    """The sign as bit 15, where 16-bit floats have it."""
    return u32(u64(f64(x).view(u64) >> u64(48)) & u64(0x8000))


@njit(error_model="numpy", forceinline=True)
def narrow_F64(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return x


@njit(error_model="numpy", forceinline=True)
def narrow_F32(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return f32(x)


@njit(error_model="numpy", forceinline=True)
def narrow_BF16(x):  # type: ignore[no-untyped-def]  # noqa: N802
    """8 significant bits, exponents from -126 to 127; every NaN is the same."""
    near = f32(rounded(x, 45, u64(0x3810000000000000), u64(0x47F0000000000000)))
    return np.uint16(u32(0x7FC0) if x != x else u32(u32(near.view(u32) >> u32(16)) | sign_bit(x)))


@njit(error_model="numpy", forceinline=True)
def narrow_F16(x):  # type: ignore[no-untyped-def]  # noqa: N802
    """11 significant bits, exponents from -14 to 15; every NaN is the same."""
    near = rounded(x, 42, u64(0x3F10000000000000), u64(0x40F0000000000000))
    normal = u32(u32(f32(near).view(u32) >> u32(13)) - u32(112 << 10))
    tiny = u32(near * 16777216.0 if near < 6.103515625e-05 else 0.0)
    code = tiny if near < 6.103515625e-05 else (normal if near < 65520.0 else u32(0x7C00))
    return np.uint16(u32(0x7E00) if x != x else u32(code | sign_bit(x)))


@njit(error_model="numpy", forceinline=True)
def strange_F64(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return u32(u64(f64(x).view(u64) & u64(0x7FF0000000000000)) == u64(0x7FF0000000000000))


@njit(error_model="numpy", forceinline=True)
def strange_F32(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return u32(u32(f32(x).view(u32) & u32(0x7F800000)) == u32(0x7F800000))


@njit(error_model="numpy", forceinline=True)
def strange_BF16(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return u32(u32(x & u32(0x7F80)) == u32(0x7F80))


@njit(error_model="numpy", forceinline=True)
def strange_F16(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return u32(u32(x & u32(0x7C00)) == u32(0x7C00))


@njit(error_model="numpy", forceinline=True)
def strange_F8_E4M3(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return u32(u32(x & u32(0x7F)) == u32(0x7F))


@njit(error_model="numpy", forceinline=True)
def strange_F8_E5M2(x):  # type: ignore[no-untyped-def]  # noqa: D103, N802
    return u32(u32(x & u32(0x7C)) == u32(0x7C))


@njit(error_model="numpy", forceinline=True)
def draw(key, pair):  # type: ignore[no-untyped-def]
    """The two words of Philox2x32-10 (Salmon 2011) for a pair of coordinates; the first of them is the lower half."""
    word = u64(0xFFFFFFFF)
    low = pair & word
    high = (pair >> u64(32)) ^ (key >> u64(32))
    turn = key & word
    for _ in range(10):  # in 64-bit lanes throughout, which LLVM keeps in vectors
        product = low * u64(0xD256D193)
        low = (product >> u64(32)) ^ turn ^ high
        high = product & word
        turn = (turn + u64(0x9E3779B9)) & word
    return u64(high << u64(32)) | low


@njit(error_model="numpy", forceinline=True)
def unit(drawn):  # type: ignore[no-untyped-def]
    """A word as a number in [0, 1), the same on any machine."""
    return f64(i64(drawn)) * 2.3283064365386963e-10
