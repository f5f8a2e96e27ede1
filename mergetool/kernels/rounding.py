"""Floating dtypes as NumPy bit patterns: widened to float64 exactly, narrowed from float64 with one rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]


def _float8_values(exponent_bits: int, mantissa_bits: int, bias: int, finite_only: bool) -> Float64:
    """All 256 values of a float8 format (OCP 8-bit floating point specification, section 5)."""
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    top = exponent == (1 << exponent_bits) - 1
    if finite_only:  # E4M3: only the all-ones pattern is a NaN
        value = np.where(top & (mantissa == 1 - 2.0**-mantissa_bits), np.nan, value)
    else:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    return np.where(codes & 0x80, -value, value)


FLOAT8_VALUES = {
    "F8_E4M3": _float8_values(4, 3, 7, finite_only=True),
    "F8_E5M2": _float8_values(5, 2, 15, finite_only=False),
}
"""The value of every code of the float8 formats."""

OVERFLOW = {"F64": np.inf, "F32": 3.4028235677973366e38, "BF16": 3.3961775292304601e38, "F16": 65520.0}
"""The magnitude from which a float64 rounds to infinity in each output dtype."""

READABLE = ("F64", "F32", "BF16", "F16", *FLOAT8_VALUES)
"""Floating dtypes that can be merged."""

WRITABLE = tuple(OVERFLOW)
"""Floating dtypes that can be the result of a merge."""


def _widen_bf16(bits: Array) -> Float64:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _narrow_bf16(values: Float64) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = values.astype(np.float32)
        error = values - nearest.astype(np.float64)
    bits = nearest.view(np.uint32).copy()
    # round to odd first, so that the second rounding does not see a tie that is none
    nudge = np.isfinite(nearest) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    bits[nudge & ((error > 0) == (values > 0))] += np.uint32(1)
    bits[nudge & ((error > 0) != (values > 0))] -= np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def _narrow_f16(values: Float64) -> Array:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).view(np.uint16)
    half[np.isnan(values)] = 0x7E00
    return half


def _narrow_f32(values: Float64) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


_WIDEN: dict[str, Callable[[Array], Float64]] = {
    "F64": lambda x: x.astype(np.float64),
    "F32": lambda x: x.astype(np.float64),
    "BF16": _widen_bf16,
    "F16": lambda x: x.view(np.float16).astype(np.float64),
    "F8_E4M3": lambda x: FLOAT8_VALUES["F8_E4M3"][x],
    "F8_E5M2": lambda x: FLOAT8_VALUES["F8_E5M2"][x],
}
_NARROW: dict[str, Callable[[Float64], Array]] = {
    "F64": lambda x: x,
    "F32": _narrow_f32,
    "BF16": _narrow_bf16,
    "F16": _narrow_f16,
}


def widen(raw: Array, dtype: str) -> Float64:
    """Raw storage of a floating dtype as float64, exactly."""
    return _WIDEN[dtype](raw)


def narrow(values: Float64, dtype: str) -> Array:
    """float64 values as raw storage of a floating dtype, rounded once to nearest even."""
    return _NARROW[dtype](values)
