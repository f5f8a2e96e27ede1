"""Merges of the small networks as mergetool makes them: `merge_tensors`, the text of RegMean, the training of DAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from digits_adapter import network
from digits_data import Data
from digits_networks import CONFIG, LAYERS, Weights, reads

from mergetool import METHODS, merge_tensors
from mergetool.anatomy import anatomy
from mergetool.execute.train.loop import Models, train
from mergetool.execute.train.settings import Settings
from mergetool.facts.dam import apply, slots
from mergetool.facts.statistics import accumulate_gram, empty_gram, finish_gram

EACH = [round(0.1 * i, 1) for i in range(16)]  # scales of one delta
ROWS = 32  # images of each task in a step of DAM
DAM = Settings(held_out=0.0)
"""As by default, but that all images are trained on."""
COLUMNS = replace(DAM, granularity="column", learning_rate=0.3)
"""Columns alone, which take a higher rate than rows and columns together."""
PUBLISHED = replace(COLUMNS, form="full", trainable=("linear",), learning_rate=1e-2, temperature=2.0, similarity=0.01)
"""As the paper has it: whole weights, and a penalty on similar coefficients."""


def merged(method: str, several: Sequence[Weights], base: Weights | None = None, **parameters: Any) -> Weights:
    """A merge by one of the catalogue's methods, tensor by tensor."""
    return {
        name: merge_tensors(
            method,
            [weights[name] for weights in several],
            base=None if base is None else base[name],
            name=name,
            parameters={"weight": 1.0, **parameters},
        )
        for name in several[0]
    }


def average(several: Sequence[Weights]) -> Weights:
    """The plain mean."""
    return merged("linear", several)


def task_arithmetic(
    base: Weights, several: Sequence[Weights], scale: float, weight: float | list[float] = 1.0
) -> Weights:
    """The base plus `scale` times the sum of the deltas, each by a weight."""
    return merged("task_arithmetic", several, base, weight=weight, **{"lambda": scale})


def scale_each(
    base: Weights, several: Sequence[Weights], common: float, score: Callable[[Weights], float]
) -> list[float]:
    """A scale for each delta, best by a score: of two all pairs are tried, more are gone through one by one.

    That begins with the best common scale, and ends when a round finds nothing better, or after three.
    """

    def of(scales: list[float]) -> float:
        return score(task_arithmetic(base, several, 1.0, scales))

    if len(several) == 2:
        return max(([*pair] for pair in product(EACH, repeat=2)), key=of)
    scales = [common] * len(several)
    top = of(scales)
    for _ in range(3):
        before = top
        for at in range(len(scales)):
            for scale in EACH:
                tried = [*scales[:at], scale, *scales[at + 1 :]]
                if (value := of(tried)) > top:
                    scales, top = tried, value
        if top == before:
            break
    return scales


def ties(base: Weights, several: Sequence[Weights], scale: float) -> Weights:
    """TIES as in its paper: a fifth of each delta is kept."""
    return merged("ties", several, base, density=0.2, **{"lambda": scale})


def regmean(several: Sequence[Weights], data: Sequence[Data]) -> Weights:
    """RegMean at its defaults, each network's inputs measured on its own images; biases are averaged."""
    result, method = average(several), METHODS["regmean"]
    for layer in [*LAYERS, "head"]:
        values, grams = [], []
        for weights, own in zip(several, data, strict=True):
            seen = reads(weights, layer, own.x)
            state = empty_gram(seen.shape[1])
            accumulate_gram(state, seen)
            grams.append(finish_gram(state)["gram"].double().numpy() / len(seen))
            values.append(weights[f"{layer}.weight"].double().numpy())
        parameters = {"weight": (1.0,) * len(several), "off_diagonal": 0.9, "ridge": 1e-6}
        result[f"{layer}.weight"] = torch.from_numpy(method(values, grams, **parameters)).float()
    return result


@dataclass(frozen=True)
class Read:
    """A network's weights by name."""

    tensors: Weights

    def get(self, name: str) -> torch.Tensor:
        """The weight of this name."""
        return self.tensors[name]


def dam(base: Weights, several: Sequence[Weights], data: Sequence[Data], settings: Settings = DAM) -> Weights:
    """DAM: coefficients are trained by mergetool, and its merge made of them."""
    settings = replace(settings, batch_tokens=ROWS * len(several))  # an image counts as a token
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    how = {"granularity": settings.granularity, "trainable": settings.trainable}
    models = Models(
        module=network(CONFIG),
        sources={str(at): Read(weights) for at, weights in enumerate(several)},
        slots=slots(anatomy(CONFIG, shapes).parts, shapes, **how),  # type: ignore[arg-type]
        base=("base", Read(base)),
    )
    rows = [[{"pixels": image} for image in own.x.split(1)] for own in data]
    made = train(models, rows, settings).coefficients
    result = {}
    for name, start in base.items():
        tensors = [weights[name].numpy() for weights in several]
        origin = start.numpy() if settings.form == "delta" else None
        result[name] = torch.from_numpy(apply(made.of(name), tensors, origin)).float()
    return result
