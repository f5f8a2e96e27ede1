"""Centred kernel alignment of two models' activations: how alike their features are, whatever their basis.

Linear, by batches, from the unbiased estimator of HSIC (Song et al. 2012; Nguyen et al. 2021): with ``K = XXᵀ`` and
``L = YYᵀ`` of ``m`` rows, ``m`` at least :data:`FEWEST`, zeros on their diagonals,

    HSIC(K, L) = [Σ K∘L + (1ᵀK1)(1ᵀL1) / ((m-1)(m-2)) - 2/(m-2) · 1ᵀKL1] / (m(m-3)),

summed over batches and divided at the end.
"""

from __future__ import annotations

from typing import Any

import torch

from mergetool.facts.statistics import State

FEWEST = 4
"""Rows of a batch; the unbiased estimator needs them."""


def _hollow(kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A kernel with zeros on its diagonal, flat, and the sums of its rows; what is given is overwritten."""
    kernel.fill_diagonal_(0)
    return kernel.flatten(), kernel.sum(1)


def _hsic(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    (k, rows_k), (l, rows_l) = first, second  # noqa: E741 - the letter of the papers
    m = len(rows_k)
    whole = k @ l + rows_k.sum() * rows_l.sum() / ((m - 1) * (m - 2)) - 2 / (m - 2) * rows_k @ rows_l
    return whole / (m * (m - 3))


def empty_hsic(device: Any = "cpu") -> State:
    """No batch yet."""
    return {key: torch.zeros((), dtype=torch.float64, device=device) for key in ("xy", "xx", "yy", "count")}


def accumulate_hsic(state: State, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add the HSICs of a batch of rows ``x [m, p]`` and ``y [m, q]``; one of fewer than four rows is left out."""
    if len(x) < FEWEST:
        return
    k, l = (_hollow(centred @ centred.T) for centred in map(_centred, (x, y)))  # noqa: E741
    for key, pair in (("xy", (k, l)), ("xx", (k, k)), ("yy", (l, l))):
        state[key] += _hsic(*pair)
    state["count"] += len(x)


def finish_hsic(state: State) -> State:
    """``cka``: float64 scalar, about 0 for unrelated features (below, by chance, at times) and 1 for equal ones.

    It is 0 where a model's features are constant.
    """
    return {"cka": _ratio(state["xy"], state["xx"], state["yy"]), "count": state["count"].clone()}


def _centred(rows: torch.Tensor) -> torch.Tensor:
    """The rows less their mean in float64, which changes no HSIC; zeros where only rounding would be left."""
    values = rows.double()
    centred = values - values.mean(0)
    return centred * (centred.square().sum() > 1e-20 * values.square().sum())


def _ratio(xy: torch.Tensor, xx: torch.Tensor, yy: torch.Tensor) -> torch.Tensor:
    scale = (xx.clamp(min=0) * yy.clamp(min=0)).sqrt()
    return torch.where(scale > 0, xy / scale, torch.zeros_like(xy))
