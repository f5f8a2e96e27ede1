"""Statistics of activations and gradients, taken batch by batch: empty, accumulate, finish.

A state is a flat dict of named torch tensors, so that it can be saved and taken up again; it is added to in place.
Rows are activations ``[n, channels]`` in float32, without the rows of padding. What is summed is float64; products
within a batch are float32. Empty rows change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

State = dict[str, torch.Tensor]
_STRIP = 512
"""Channels whose products are computed at once."""
Side = Literal["input", "output", "gradient"]


@dataclass(frozen=True)
class Statistic:
    """How one kind of fact is made.

    Attributes:
        name: what recipes of facts call it.
        side: what is looked at: what goes into a tensor's module, what comes out, or the tensor's gradient.
        fields: what :attr:`finish` makes, each a tensor by this name.
        empty: the state before anything was seen, for a shape and a device.
        accumulate: adds to a state in place.
        finish: the facts that a state holds; the state is not changed.
    """

    name: str
    side: Side
    fields: tuple[str, ...]
    empty: Callable[..., State]
    accumulate: Callable[..., None]
    finish: Callable[[State], State]


def _zeros(*shape: int, device: Any = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=device)


def empty_gram(channels: int, device: Any = "cpu") -> State:
    """No rows of so many channels yet."""
    return {"gram": _zeros(channels, channels, device=device), "count": _zeros(device=device)}


def accumulate_gram(state: State, rows: torch.Tensor) -> None:
    """Add ``XᵀX`` of the rows ``X [n, channels]`` to the Gram matrix (RegMean, arXiv:2212.09849).

    Only strips on and above the diagonal are kept up; :func:`finish_gram` mirrors them.
    """
    for start in range(0, rows.shape[1], _STRIP):  # torch would widen a whole product to float64 at once
        strip = slice(start, start + _STRIP)
        state["gram"][strip, start:] += rows[:, strip].T @ rows[:, start:]
    state["count"] += len(rows)


def finish_gram(state: State) -> State:
    """``gram``: the sum ``XᵀX`` in float32 ``[channels, channels]``; ``count``: its rows in float64."""
    gram = state["gram"].float()
    for start in range(0, len(gram), _STRIP):
        stop = start + _STRIP
        gram[stop:, start:stop] = gram[start:stop, stop:].T
        square = gram[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)  # products of strips differ in their last bits
    return {"gram": gram, "count": state["count"].clone()}


def empty_moments(channels: int, device: Any = "cpu") -> State:
    """No rows of so many channels yet."""
    return {
        "mean": _zeros(channels, device=device),
        "squares": _zeros(channels, device=device),
        "count": _zeros(device=device),
    }


def accumulate_moments(state: State, rows: torch.Tensor) -> None:
    """Merge the mean and the summed squared deviations of the rows ``[n, channels]`` (Chan et al. 1979)."""
    if len(rows) == 0:
        return
    mean, squares = _deviations(rows)
    total = state["count"] + len(rows)
    step = mean - state["mean"]
    state["squares"] += squares + step.square() * (state["count"] * len(rows) / total)
    state["mean"] += step * (len(rows) / total)
    state["count"] += len(rows)


def _deviations(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each channel's mean and sum of squared deviations, in float64."""
    values = rows.double()
    mean = values.mean(0)
    return mean, (values - mean).square_().sum(0)


def finish_moments(state: State) -> State:
    """``mean`` and ``std`` of each channel in float32, ``count`` in float64; the deviation is the population's."""
    std = (state["squares"] / state["count"].clamp(min=1)).sqrt()
    return {"mean": state["mean"].float(), "std": std.float(), "count": state["count"].clone()}


def finish_input_moments(state: State) -> State:
    """The same as :func:`finish_moments`, of what goes into a module: ``input.mean``, ``input.std``, ``count``."""
    found = finish_moments(state)
    return {"input.mean": found["mean"], "input.std": found["std"], "count": found["count"]}


def empty_cross(first: int, second: int, device: Any = "cpu") -> State:
    """No rows yet of two models with so many channels."""
    state = {
        f"{key}_{i}": _zeros(n, device=device) for i, n in ((1, first), (2, second)) for key in ("mean", "squares")
    }
    return state | {"products": _zeros(first, second, device=device), "count": _zeros(device=device)}


def accumulate_cross(state: State, first: torch.Tensor, second: torch.Tensor) -> None:
    """Merge the centred products of two models' rows ``[n, channels]`` for the same tokens.

    Raises:
        ValueError: the numbers of rows differ.
    """
    _same_tokens(first, second)
    if len(first) == 0:
        return
    count, n = state["count"], len(first)
    share = count * n / (count + n)
    steps = []
    for key, rows in (("1", first), ("2", second)):
        mean, squares = _deviations(rows)
        step = mean - state[f"mean_{key}"]
        state[f"squares_{key}"] += squares + step.square() * share
        state[f"mean_{key}"] += step * (n / (count + n))
        steps.append(step)
    centred = [rows - rows.mean(0) for rows in (first, second)]
    for start in range(0, len(steps[0]), _STRIP):
        strip = slice(start, start + _STRIP)
        state["products"][strip] += centred[0][:, strip].T @ centred[1]
    state["products"].addr_(steps[0] * share, steps[1])
    state["count"] += n


def finish_cross(state: State) -> State:
    """``correlation``: signed, float32 ``[first, second]``, 0 for a channel that is constant; ``count``: float64."""
    inverse = [torch.where(varying(state, i), state[f"squares_{i}"].rsqrt(), 0) for i in (1, 2)]
    correlation = (state["products"] * inverse[0][:, None] * inverse[1]).clamp_(-1, 1)
    return {"correlation": correlation.float(), "count": state["count"].clone()}


def varying(state: State, i: Literal[1, 2]) -> torch.Tensor:
    """Which channels of one of two models vary: of a constant channel only rounding is left."""
    floor = 1e-6 * state["count"].sqrt() * state[f"mean_{i}"].abs()
    return state[f"squares_{i}"].sqrt() > floor


def empty_inner(first: int, second: int, device: Any = "cpu") -> State:
    """No rows yet of two models with so many channels."""
    state = {f"squares_{i}": _zeros(n, device=device) for i, n in ((1, first), (2, second))}
    return state | {"products": _zeros(first, second, device=device), "count": _zeros(device=device)}


def accumulate_inner(state: State, first: torch.Tensor, second: torch.Tensor) -> None:
    """Add the products ``XᵀY`` of two models' rows ``[n, channels]`` for the same tokens, as they are.

    They are all that depends on the order of units in ``sum(|x_i - y_p(i)|²)``, which matching by activations makes
    least (Git Re-Basin, arXiv:2209.04836, section 3.1).

    Raises:
        ValueError: the numbers of rows differ.
    """
    _same_tokens(first, second)
    for start in range(0, first.shape[1], _STRIP):
        strip = slice(start, start + _STRIP)
        state["products"][strip] += first[:, strip].T @ second
    for i, rows in ((1, first), (2, second)):
        state[f"squares_{i}"] += rows.double().square_().sum(0)
    state["count"] += len(first)


def finish_inner(state: State) -> State:
    """``inner``: the mean product of two channels, float32 ``[first, second]``; ``rms_1`` and ``rms_2``: the root mean
    square of each channel of either model, float32; ``count``: float64.

    Two channels that always agree have the product of their root mean squares, and none have more.
    """
    count = state["count"].clamp(min=1)
    rms = {f"rms_{i}": (state[f"squares_{i}"] / count).sqrt().float() for i in (1, 2)}
    return {"inner": (state["products"] / count).float(), **rms, "count": state["count"].clone()}


def _same_tokens(first: torch.Tensor, second: torch.Tensor) -> None:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rows of one model and {len(second)} of the other are not the same tokens")


def empty_squared_gradients(shape: tuple[int, ...], device: Any = "cpu") -> State:
    """No gradient of a tensor of this shape yet."""
    return {"sum": _zeros(*shape, device=device), "count": _zeros(device=device)}


def accumulate_squared_gradients(state: State, gradient: torch.Tensor) -> None:
    """Add one sample's squared gradient: the diagonal of the Fisher information (arXiv:2111.09832)."""
    state["sum"] += gradient.square()
    state["count"] += 1


def finish_squared_gradients(state: State) -> State:
    """``squared_gradient``: the mean over samples, float32 in the tensor's shape; ``count``: samples, float64."""
    mean = state["sum"] / state["count"].clamp(min=1)
    return {"squared_gradient": mean.float(), "count": state["count"].clone()}


def empty_sensitivity(shape: tuple[int, ...] = (), device: Any = "cpu") -> State:
    """No sample yet; with the shape ``()`` only the tensor's total is kept."""
    return empty_squared_gradients(shape, device)


def accumulate_sensitivity(state: State, weight: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add one sample's ``|w · ∂L/∂w|``: how much the loss would change without each weight, to first order."""
    products = (weight * gradient).abs()
    state["sum"] += products if state["sum"].ndim else products.sum(dtype=torch.float64)
    state["count"] += 1


def finish_sensitivity(state: State) -> State:
    """``sensitivity``: the mean over samples, float32 of the state's shape; ``count``: samples, float64."""
    mean = state["sum"] / state["count"].clamp(min=1)
    return {"sensitivity": mean.float(), "count": state["count"].clone()}


GRAM = Statistic("gram", "input", ("gram", "count"), empty_gram, accumulate_gram, finish_gram)
MOMENTS = Statistic("moments", "output", ("mean", "std", "count"), empty_moments, accumulate_moments, finish_moments)
INPUT_MOMENTS = Statistic(
    "input_moments",
    "input",
    ("input.mean", "input.std", "count"),
    empty_moments,
    accumulate_moments,
    finish_input_moments,
)
SQUARED_GRADIENTS = Statistic(
    "squared_gradients",
    "gradient",
    ("squared_gradient", "count"),
    empty_squared_gradients,
    accumulate_squared_gradients,
    finish_squared_gradients,
)
SENSITIVITY = Statistic(
    "sensitivity", "gradient", ("sensitivity", "count"), empty_sensitivity, accumulate_sensitivity, finish_sensitivity
)
STATISTICS = {each.name: each for each in (GRAM, MOMENTS, INPUT_MOMENTS, SQUARED_GRADIENTS, SENSITIVITY)}
"""The statistics of one model, by name."""
