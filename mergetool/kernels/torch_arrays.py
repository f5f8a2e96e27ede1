"""The kernels of a coordinate text on a torch device, float64 throughout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mergetool.kernels.arrays import NumpyArrays
from mergetool.kernels.backend import BLOCK, Array
from mergetool.kernels.rounding import OVERFLOW

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.float32, 8: np.float64}


def _odd(values: torch.Tensor) -> torch.Tensor:
    """Round float64 to float32 *to odd*, so that a further rounding comes out as if done once."""
    nearest = values.float()
    bits = nearest.view(torch.int32)
    error = values - nearest.double()
    step = torch.where((error > 0) == (values > 0), 1, -1).int()
    nudge = torch.isfinite(nearest) & (error != 0) & ((bits & 1) == 0)
    return torch.where(nudge, bits + step, bits).view(torch.float32)


def _where(condition: torch.Tensor, yes: Any, no: Any) -> torch.Tensor:
    """Choose, numbers as float64: torch.where would make them float32."""
    yes, no = (torch.as_tensor(x, dtype=torch.float64, device=condition.device) for x in (yes, no))
    return torch.where(condition, yes, no)


class TorchArrays(NumpyArrays):
    """Whole tiles on a torch device: ``cuda``, ``cuda:1``, or ``cpu`` to test the same code without a GPU."""

    names: dict[str, Any] = {  # noqa: RUF012 - constant
        "where": _where,
        "sign": torch.sign,
        "sqrt": torch.sqrt,
        "minimum": torch.minimum,
        "maximum": torch.maximum,
    }

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def load(self, raw: Array, dtype: str) -> torch.Tensor:
        """Copy a raw tile to the device and widen it there."""
        signed = np.ascontiguousarray(raw).view(_SIGNED[raw.itemsize])
        moved = torch.from_numpy(signed).to(self.device, non_blocking=True)
        return moved.view(_TORCH[dtype]).double()

    def store(self, values: torch.Tensor, dtype: str, out: Array) -> int:
        """Round on the device and copy into the raw tile ``out``; returns how many values are not finite there."""
        bad = int((~(values.abs() < OVERFLOW[dtype])).sum())
        narrowed = values if dtype == "F64" else values.float() if dtype == "F32" else _odd(values).to(_TORCH[dtype])
        signed = {2: torch.int16, 4: torch.float32, 8: torch.float64}[out.itemsize]
        out.view(_SIGNED[out.itemsize])[...] = narrowed.view(signed).cpu().numpy()
        return bad

    def infinite(self, values: torch.Tensor) -> int:
        """How many values are not finite."""
        return int((~torch.isfinite(values)).sum())

    def draws(self, key: int, start: int, stop: int) -> torch.Tensor:
        """The draws of :func:`mergetool.kernels.random.draws`, in wrapping int64 arithmetic."""
        word = 0xFFFFFFFF
        coordinate = torch.arange(start, stop, dtype=torch.int64, device=self.device)
        low = coordinate & word
        high = (coordinate >> 32) ^ (key >> 32)
        turn = key & word
        for _ in range(10):
            product = low * 0xD256D193
            low = ((product >> 32) & word) ^ turn ^ high
            high = product & word
            turn = (turn + 0x9E3779B9) & word
        return low.double() * 2.0**-32

    def block_sums(self, term: torch.Tensor, size: int) -> Array:
        """The float64 sum of each block."""
        sums: Array = torch.stack([part.sum() for part in term.split(BLOCK)]).cpu().numpy()
        return sums

    def magnitude_bits(self, delta: torch.Tensor) -> Any:
        """The float32 bit patterns of the magnitudes."""
        return delta.abs().float().view(torch.int32)

    def count(self, codes: torch.Tensor) -> Array:
        """How often each of 65536 codes occurs."""
        counts: Array = torch.bincount(codes, minlength=1 << 16).cpu().numpy()
        return counts
