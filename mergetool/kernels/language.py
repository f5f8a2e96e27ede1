"""The handful of functions a coordinate method is written in, bound to NumPy: the float64 reading of its text.

A coordinate method says what happens to *one* weight. Its text uses ``+ - * /``, comparisons, ``abs`` and the names
below, and nothing else on coordinates; parameters are plain scalars, so an ordinary ``if`` on them is fine. The same
text is compiled for the CPU (:mod:`mergetool.kernels.prelude` defines the same names on scalars) and for GPUs
(:mod:`mergetool.kernels.cuda_prelude`), or run by torch (:mod:`mergetool.kernels.torch_arrays`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("where", "sign", "sqrt", "minimum", "maximum")
"""What a binding has to define."""


def where(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where the condition holds, else ``no``; both are always computed."""
    return np.where(condition, yes, no)


def sign(x: Any) -> Any:
    """1, 0 or -1."""
    return np.sign(x)


def sqrt(x: Any) -> Any:
    """The square root."""
    return np.sqrt(x)


def minimum(x: Any, y: Any) -> Any:
    """The smaller of two."""
    return np.minimum(x, y)


def maximum(x: Any, y: Any) -> Any:
    """The larger of two."""
    return np.maximum(x, y)
