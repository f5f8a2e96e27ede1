"""Every element type a safetensors file may hold: its name, its width, and how NumPy carries its raw bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mergetool.errors import HeaderError

# The largest number of bits a tensor may have: readers in other languages count in 64-bit unsigned integers.
_MOST_BITS = 1 << 64


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of the safetensors format.

    Attributes:
        name: the spelling in a header: ``"BF16"``.
        bits: the width of one element; 4 and 6 for types that share bytes.
        kind: ``"float"``, ``"int"``, ``"uint"``, ``"bool"`` or ``"complex"``.
        storage: the little-endian NumPy dtype of the raw elements. 32- and 64-bit floats and all integers are
            themselves; 8- and 16-bit floats are unsigned integers of the same width; types narrower than a
            byte are packed bytes.
        torch_name: the spelling in torch: ``"bfloat16"``.
    """

    name: str
    bits: int
    kind: str
    storage: np.dtype[Any]
    torch_name: str

    @property
    def is_float(self) -> bool:
        """Whether the elements are real floating-point numbers, of any width."""
        return self.kind == "float"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """The number of bytes of a tensor of this type and ``shape``.

        Raises:
            HeaderError: the bits do not fill whole bytes, or their number does not fit 64 bits.
        """
        bits = self.bits
        for length in shape:
            bits *= length
            if bits >= _MOST_BITS:  # checked at each step: a hostile shape must not grow a giant integer
                raise HeaderError(f"the shape is too large: {len(shape)} axes overflow 64 bits")
        if bits % 8:
            raise HeaderError(f"{bits} bits of {self.name} do not fill whole bytes")
        return bits // 8

    def __str__(self) -> str:
        return self.name


def _dtype(name: str, bits: int, kind: str, storage: str, torch_name: str) -> DType:
    return DType(name, bits, kind, np.dtype(storage), torch_name)


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            _dtype("F64", 64, "float", "<f8", "float64"),
            _dtype("F32", 32, "float", "<f4", "float32"),
            _dtype("BF16", 16, "float", "<u2", "bfloat16"),
            _dtype("F16", 16, "float", "<u2", "float16"),
            _dtype("F8_E4M3", 8, "float", "u1", "float8_e4m3fn"),
            _dtype("F8_E5M2", 8, "float", "u1", "float8_e5m2"),
            _dtype("F8_E4M3FNUZ", 8, "float", "u1", "float8_e4m3fnuz"),
            _dtype("F8_E5M2FNUZ", 8, "float", "u1", "float8_e5m2fnuz"),
            _dtype("F8_E8M0", 8, "float", "u1", "float8_e8m0fnu"),
            _dtype("F6_E2M3", 6, "float", "u1", "float6_e2m3fn"),
            _dtype("F6_E3M2", 6, "float", "u1", "float6_e3m2fn"),
            _dtype("F4", 4, "float", "u1", "float4_e2m1fn_x2"),
            _dtype("I64", 64, "int", "<i8", "int64"),
            _dtype("I32", 32, "int", "<i4", "int32"),
            _dtype("I16", 16, "int", "<i2", "int16"),
            _dtype("I8", 8, "int", "i1", "int8"),
            _dtype("U64", 64, "uint", "<u8", "uint64"),
            _dtype("U32", 32, "uint", "<u4", "uint32"),
            _dtype("U16", 16, "uint", "<u2", "uint16"),
            _dtype("U8", 8, "uint", "u1", "uint8"),
            _dtype("BOOL", 8, "bool", "u1", "bool"),
            _dtype("C64", 64, "complex", "<c8", "complex64"),
        )
    }
)
"""Every dtype of safetensors 0.8, by the name a header spells."""

_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DTYPES.values()}


def dtype(name: str) -> DType:
    """The dtype called ``name``, in the spelling of a header (``"BF16"``) or of torch (``"bfloat16"``).

    Raises:
        HeaderError: no dtype has that name.
    """
    found = DTYPES.get(name) or _BY_TORCH_NAME.get(name)
    if found is None:
        raise HeaderError(f"unknown dtype {name[:40]!r}", fix=f"known are {', '.join(DTYPES)} and their torch names")
    return found
