"""The kernels of a coordinate text on a torch device, float64 throughout."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
_QUIET = {"BF16": 0x7FC0, "F16": 0x7E00}
"""The NaN of each 16-bit dtype, as :mod:`mergetool.kernels.rounding` writes it."""
_SIGNED = {1: np.int8, 2: np.int16, 4: np.float32, 8: np.float64}


def _odd(values: torch.Tensor) -> torch.Tensor:
    """Round float64 to float32 *to odd*, so that a further rounding comes out as if done once."""
    nearest = values.float()
    bits = nearest.view(torch.int32)
    error = values - nearest.double()
    step = torch.where((error > 0) == (values > 0), 1, -1).int()
    nudge = torch.isfinite(nearest) & (error != 0) & ((bits & 1) == 0)
    return torch.where(nudge, bits + step, bits).view(torch.float32)


def _on_numbers(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same function, plain numbers among its arguments taken as float64: torch refuses them or takes float32."""

    def number(x: Any) -> torch.Tensor:
        return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)

    def mixed(*arguments: Any) -> torch.Tensor:
        return function(*(number(x) for x in arguments))

    return mixed


def _where(condition: Any, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(condition.bool(), yes, no)


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """On the CPU by NumPy: torch's may take a library's root there that is not correctly rounded."""
    return torch.sqrt(x) if x.device.type != "cpu" else torch.as_tensor(np.sqrt(x.numpy()))


class TorchArrays(NumpyArrays):
    """Whole tiles on a torch device: ``cuda``, ``cuda:1``, or ``cpu`` to test the same code without a GPU."""

    names: dict[str, Any] = {  # noqa: RUF012 - constant
        "where": _on_numbers(_where),
        "sign": _on_numbers(torch.sign),
        "sqrt": _on_numbers(_sqrt),
        "minimum": _on_numbers(torch.minimum),
        "maximum": _on_numbers(torch.maximum),
    }

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.matrices = str(self.device)
        self._own = threading.local()

    def lane(self) -> AbstractContextManager[Any]:
        """A stream of each worker's own: what one copies in and out goes on while another's kernels run."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        lane: AbstractContextManager[Any] = torch.cuda.stream(self._own.stream)
        return lane

    def load(self, raw: Array, dtype: str) -> torch.Tensor:
        """Copy a raw tile to the device and widen it there."""
        signed = np.ascontiguousarray(raw).view(_SIGNED[raw.itemsize])
        moved = torch.from_numpy(signed).to(self.device, non_blocking=True)
        return moved.view(_TORCH[dtype]).double()

    def store(self, values: torch.Tensor, dtype: str, out: Array) -> torch.Tensor:
        """Round on the device and copy into the raw tile ``out``; returns where the values are not finite there."""
        if dtype in _QUIET:
            bits = _odd(values).to(_TORCH[dtype]).view(torch.int16)
            narrowed = torch.where(values.isnan(), _QUIET[dtype], bits)  # torch's own NaN differs by device
        else:
            narrowed = values.to(_TORCH[dtype])
        place = torch.from_numpy(out.view(_SIGNED[out.itemsize]))
        place.copy_(narrowed.view(place.dtype))  # waits for the worker's own stream only
        return ~(values.abs() < OVERFLOW[dtype])

    def infinite(self, values: torch.Tensor) -> torch.Tensor:
        """Where values are not finite."""
        return ~torch.isfinite(values)

    def draws(self, key: int, start: int, stop: int) -> torch.Tensor:
        """The draws of :func:`mergetool.kernels.random.draws`, in wrapping int64 arithmetic."""
        word = 0xFFFFFFFF
        pair = torch.arange(start >> 1, (stop + 1) >> 1, dtype=torch.int64, device=self.device)
        low = pair & word
        high = (pair >> 32) ^ (key >> 32)
        turn = key & word
        for _ in range(10):
            product = low * 0xD256D193
            low = ((product >> 32) & word) ^ turn ^ high
            high = product & word
            turn = (turn + 0x9E3779B9) & word
        words = torch.stack([low, high], dim=1).view(-1)
        return words[start & 1 :][: stop - start].double() * 2.0**-32

    def block_sums(self, term: torch.Tensor, size: int) -> Array:
        """The float64 sum of each block."""
        sums: Array = torch.stack([part.sum() for part in term.split(BLOCK)]).cpu().numpy()
        return sums

    def magnitude_bits(self, delta: torch.Tensor) -> torch.Tensor:
        """The float32 bit patterns of the magnitudes, as int64."""
        return delta.abs().float().view(torch.int32).long()

    def gathered(self, bits: torch.Tensor, low: int, high: int) -> Array:
        """The magnitudes in ``low <= bits < high``."""
        inside: Array = bits[(bits >= low) & (bits < high)].cpu().numpy().astype(np.uint32)
        return inside
