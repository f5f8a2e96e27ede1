"""What kernels for NVIDIA's GPUs are made of: the functions of :mod:`mergetool.kernels.prelude`, in C++.

Operation by operation the same, so the bits are the same as the CPU's: float64 throughout, compiled without fused
multiplication and addition.
"""

from __future__ import annotations

import numpy as np

from mergetool.kernels.rounding import FLOAT8_VALUES

TYPES = {"F64": "double", "F32": "float", "BF16": "u16", "F16": "u16", "F8_E4M3": "u8", "F8_E5M2": "u8"}
"""How the raw elements of each dtype are read."""

_BEGIN = """
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

template <class To, class From>
__device__ inline To as(From x) { union { From from; To to; } both; both.from = x; return both.to; }

template <int N>
struct Pack {
    double items[N];
    __device__ double operator[](int i) const { return items[i]; }
};

template <class... T>
__device__ inline Pack<sizeof...(T)> pack(T... x) { return {{double(x)...}}; }

template <class C>
__device__ inline double where(C condition, double yes, double no) { return condition ? yes : no; }

__device__ inline double sign(double x) { return x > 0.0 ? 1.0 : (x < 0.0 ? -1.0 : 0.0); }
__device__ inline double minimum(double x, double y) { return (x < y || x != x) ? x : y; }
__device__ inline double maximum(double x, double y) { return (x > y || x != x) ? x : y; }

__device__ inline double widen_F64(double x) { return x; }
__device__ inline double widen_F32(float x) { return double(x); }
__device__ inline double widen_BF16(u16 x) { return double(as<float>(u32(x) << 16)); }
__device__ inline double widen_F16(u16 x) {
    double scaled = double(as<float>((x & 0x7FFFu) << 13)) * 5.192296858534828e33;
    double magnitude = (x & 0x7C00u) != 0x7C00u ? scaled
        : as<double>((x & 0x03FFu) == 0u ? 0x7FF0000000000000ull : 0x7FF8000000000000ull);
    return (x & 0x8000u) != 0u ? -magnitude : magnitude;
}

__device__ inline double rounded(double x, u64 digits, u64 lowest, u64 highest) {
    u64 exponent = as<u64>(x) & 0x7FF0000000000000ull;
    exponent = exponent < lowest ? lowest : exponent;
    exponent = exponent > highest ? highest : exponent;
    double power = as<double>(exponent + (digits << 52));
    return (fabs(x) + power) - power;
}
__device__ inline u32 sign_bit(double x) { return u32((as<u64>(x) >> 48) & 0x8000ull); }

__device__ inline double narrow_F64(double x) { return x; }
__device__ inline float narrow_F32(double x) { return float(x); }
__device__ inline u16 narrow_BF16(double x) {
    float near = float(rounded(x, 45, 0x3810000000000000ull, 0x47F0000000000000ull));
    return u16(x != x ? 0x7FC0u : ((as<u32>(near) >> 16) | sign_bit(x)));
}
__device__ inline u16 narrow_F16(double x) {
    double near = rounded(x, 42, 0x3F10000000000000ull, 0x40F0000000000000ull);
    u32 normal = (as<u32>(float(near)) >> 13) - u32(112 << 10);
    u32 tiny = near < 6.103515625e-05 ? u32(near * 16777216.0) : 0u;
    u32 code = near < 6.103515625e-05 ? tiny : (near < 65520.0 ? normal : 0x7C00u);
    return u16(x != x ? 0x7E00u : (code | sign_bit(x)));
}

__device__ inline u32 strange_F64(double x) { return (as<u64>(x) & 0x7FF0000000000000ull) == 0x7FF0000000000000ull; }
__device__ inline u32 strange_F32(float x) { return (as<u32>(x) & 0x7F800000u) == 0x7F800000u; }
__device__ inline u32 strange_BF16(u16 x) { return (x & 0x7F80u) == 0x7F80u; }
__device__ inline u32 strange_F16(u16 x) { return (x & 0x7C00u) == 0x7C00u; }
__device__ inline u32 strange_F8_E4M3(u8 x) { return (x & 0x7Fu) == 0x7Fu; }
__device__ inline u32 strange_F8_E5M2(u8 x) { return (x & 0x7Cu) == 0x7Cu; }

__device__ inline double drawn(u64 key, u64 coordinate) {
    u64 low = (coordinate >> 1) & 0xFFFFFFFFull, high = (coordinate >> 33) ^ (key >> 32), turn = key & 0xFFFFFFFFull;
    for (int i = 0; i < 10; i++) {
        u64 product = low * 0xD256D193ull;
        low = (product >> 32) ^ turn ^ high;
        high = product & 0xFFFFFFFFull;
        turn = (turn + 0x9E3779B9ull) & 0xFFFFFFFFull;
    }
    return double((coordinate & 1ull) ? high : low) * 2.3283064365386963e-10;
}
"""


def _float8(name: str) -> str:
    values = ", ".join(f"{bits:#x}ull" for bits in FLOAT8_VALUES[name].view(np.uint64).tolist())
    return (
        f"__device__ const u64 values_{name}[256] = {{{values}}};\n"
        f"__device__ inline double widen_{name}(u8 x) {{ return as<double>(values_{name}[x]); }}\n"
    )


PRELUDE = _BEGIN + "".join(map(_float8, FLOAT8_VALUES))
