"""Small networks on the digits: trained, turned, corrected and measured in plain torch.

What is pure in mergetool is used as it is: `weight_matching` and `activation_matching` find the permutations,
`goal`, `factors` and `fold` of `mergetool.facts.correction` make the corrections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from digits_adapter import network
from digits_data import Data, Task
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from mergetool.anatomy import Group, anatomy, axis_indices, symmetries, turned_array
from mergetool.facts.correction import Moments, factors, fold, fold_into_reader, goal
from mergetool.facts.matching import Score, activation_matching, scored, weight_matching
from mergetool.facts.statistics import (
    accumulate_cross,
    accumulate_inner,
    empty_cross,
    empty_inner,
    finish_cross,
    finish_inner,
)

CONFIG = {"model_type": "mlp", "input_size": 64, "hidden_sizes": [256, 256, 256], "num_labels": 10}
STEPS, RATE, BATCH = 500, 1e-3, 128
LAYERS = [f"layers.{at}" for at in range(len(CONFIG["hidden_sizes"]))]

_STATISTICS: dict[str, tuple[Callable[..., Any], ...]] = {
    "correlation": (empty_cross, accumulate_cross, finish_cross),
    "inner_product": (empty_inner, accumulate_inner, finish_inner),
}

Weights = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------- training, running


def he(seed: int) -> Weights:
    """Random weights as He's initialisation has them: normal, of variance 2 / inputs; biases zero."""
    torch.manual_seed(seed)
    net = network(CONFIG)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.zeros_(module.bias)
    return dict(net.state_dict())


def small(seed: int) -> Weights:
    """Random weights as `torch.nn.Linear` has them: uniform, of a sixth of that variance, biases too."""
    torch.manual_seed(seed)
    return dict(network(CONFIG).state_dict())


def train(task: Task, seed: int, start: Weights, steps: int = STEPS) -> Weights:
    """Adam on one task, from `start`; the seed decides the order of the images."""
    net = network(CONFIG)
    net.load_state_dict(start)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for _ in range(steps):
        rows = torch.randint(len(task.train.x), (BATCH,), generator=draw)
        optimizer.zero_grad()
        cross_entropy(net(task.train.x[rows]), task.train.y[rows]).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def save(weights: Weights, folder: Path) -> None:
    """Write a model folder, as any other: config and safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Weights:
    """Read a model folder."""
    return load_file(folder / "model.safetensors")


@cache
def _net() -> torch.nn.Module:
    return network(CONFIG)


def logits(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """What a network says of the images."""
    return functional_call(_net(), weights, (x,))


def accuracy(weights: Weights, data: Data) -> float:
    """Per cent that are right."""
    return _percent(logits(weights, data.x), data)


def ensemble_accuracy(several: Sequence[Weights], data: Data) -> float:
    """Per cent that are right when logits are averaged."""
    return _percent(torch.stack([logits(weights, data.x) for weights in several]).mean(0), data)


def _percent(predicted: torch.Tensor, data: Data) -> float:
    return 100 * float((predicted.argmax(1) == data.y).double().mean())


def reads(weights: Weights, layer: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer, or the head, reads."""
    for name in LAYERS[: LAYERS.index(layer) if layer in LAYERS else None]:
        x = torch.relu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    return x


def gives(weights: Weights, layer: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives, before the ReLU."""
    return reads(weights, layer, x) @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]


# ---------------------------------------------------------------------------------------------------- alignment


@cache
def groups() -> tuple[Group, ...]:
    """The hidden units of every layer."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _net().state_dict().items()}
    return symmetries(anatomy(CONFIG, shapes), CONFIG, shapes)


def by_weights(reference: Weights, other: Weights, seed: int = 0) -> Weights:
    """`other`, its units turned to face those of `reference` by weight matching."""
    found = weight_matching(groups(), lambda name: reference[name].numpy(), lambda name: other[name].numpy(), seed=seed)
    return turned(other, found.permutations)


def by_activations(reference: Weights, other: Weights, x: torch.Tensor, score: str = "correlation") -> Weights:
    """`other`, its units turned to face those of `reference` by what they do on the images."""
    empty, accumulate, finish = _STATISTICS[score]

    def alike(tensor: str, side: str) -> Score:
        look: Callable[..., torch.Tensor] = reads if side == "input" else gives
        first, second = (look(weights, tensor.removesuffix(".weight"), x) for weights in (reference, other))
        state = empty(first.shape[1], second.shape[1])
        accumulate(state, first, second)
        found = finish(state)
        return scored(score, lambda field: found[field].numpy())

    return turned(other, activation_matching(groups(), alike).permutations)


def turned(weights: Weights, permutations: Any) -> Weights:
    """The same network with its units in another order."""
    result = {}
    for name, tensor in weights.items():
        indices = axis_indices(groups(), permutations, name, tuple(tensor.shape))
        result[name] = torch.from_numpy(turned_array(tensor.numpy(), indices).copy())
    return result


# --------------------------------------------------------------------------------------------------- correction


def moments(values: torch.Tensor) -> Moments:
    """Of activations [n, units]."""
    values = values.double()
    return Moments(values.mean(0).numpy(), values.std(0, correction=0).numpy(), len(values))


def corrected(merged: Weights, sources: Sequence[Weights], x: torch.Tensor, scope: str = "all") -> Weights:
    """The merged network with the mean and spread that its sources have on the images, on average.

    With all sources and a mixture of the data this is REPAIR; with the expert of a task and its own images, TACT.

    Args:
        merged: the network, its head included.
        sources: the networks whose units it has, turned.
        x: images; no labels are needed.
        scope: every layer's pre-activations, each measured behind those corrected before it (`all`), or what the
            head reads (`output`).
    """
    result = dict(merged)
    for layer in LAYERS if scope == "all" else ["head"]:
        look = gives if scope == "all" else reads
        target = goal([moments(look(source, layer, x)) for source in sources])
        found = factors(target, moments(look(result, layer, x)), samples=len(x))
        into = fold if scope == "all" else fold_into_reader
        folded = into(result[f"{layer}.weight"].numpy(), result[f"{layer}.bias"].numpy(), found)
        for name, array in zip(("weight", "bias"), folded, strict=True):
            result[f"{layer}.{name}"] = torch.from_numpy(array).float()
    return result


def with_head(body: Weights, owner: Weights) -> Weights:
    """A merged body under the private head of one task."""
    return {name: owner[name] if name.startswith("head.") else tensor for name, tensor in body.items()}
