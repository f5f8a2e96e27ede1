"""Weights that are asked of a function, such as those of a source that is turned while it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergetool.anatomy import Turning
from mergetool.execute.forward.weights import Weights, refuse_nonfinite
from mergetool.execute.turned import turned_get

Get = Callable[[str], NDArray[Any]]


class Arrays:
    """Weights that a function gives as arrays.

    Args:
        shapes: the shape of every tensor by its name on disk.
        get: gives an array that nobody else keeps: float32 if it holds floats.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], get: Get) -> None:
        self.shapes, self._get = shapes, get

    def get(self, name: str) -> torch.Tensor:
        """A tensor in its shape."""
        return torch.from_numpy(np.ascontiguousarray(self._get(name))).reshape(self.shapes[name])


def getter(weights: Weights, label: str) -> Get:
    """Ask weights for arrays; what is not finite is refused.

    Args:
        weights: the model's.
        label: the model, for messages.
    """

    def get(name: str) -> NDArray[Any]:
        tensor = weights.get(name)
        refuse_nonfinite(f"{label}: {name}", tensor)
        return np.asarray(tensor.numpy())

    return get


def turned_weights(weights: Weights, turning: Turning, label: str) -> Weights:
    """The weights of a model that is turned while it is read, so that it can be run and measured.

    Args:
        weights: the model's own.
        turning: what is turned.
        label: the model, for messages.
    """
    return Arrays(weights.shapes, turned_get(getter(weights, label), turning))
