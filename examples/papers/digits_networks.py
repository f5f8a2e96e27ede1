"""Small networks on the digits: trained, turned, merged, corrected and measured in plain torch.

What is pure in mergetool is used as it is: `weight_matching` and `activation_matching` find the permutations,
`goal`, `factors` and `fold` of `mergetool.facts.correction` make the corrections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_adapter import network
from digits_data import Data, Task
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from mergetool.anatomy import Group, anatomy, axis_indices, symmetries, turned_array
from mergetool.facts.correction import Moments, factors, fold, fold_into_reader, goal
from mergetool.facts.matching import activation_matching, weight_matching
from mergetool.facts.statistics import accumulate_cross, empty_cross, finish_cross

CONFIG = {"model_type": "mlp", "input_size": 64, "hidden_sizes": [256, 256, 256], "num_labels": 10}
STEPS, RATE, BATCH = 500, 1e-3, 128
LAYERS = [f"layers.{at}" for at in range(len(CONFIG["hidden_sizes"]))]

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


def by_activations(reference: Weights, other: Weights, x: torch.Tensor) -> Weights:
    """`other`, its units turned to face those of `reference` by their correlation on the images."""

    def correlation(tensor: str, side: str) -> np.ndarray:
        look: Callable[..., torch.Tensor] = reads if side == "input" else gives
        first, second = (look(weights, tensor.removesuffix(".weight"), x) for weights in (reference, other))
        state = empty_cross(first.shape[1], second.shape[1])
        accumulate_cross(state, first, second)
        return finish_cross(state)["correlation"].numpy()

    return turned(other, activation_matching(groups(), correlation).permutations)


def turned(weights: Weights, permutations: Any) -> Weights:
    """The same network with its units in another order."""
    result = {}
    for name, tensor in weights.items():
        indices = axis_indices(groups(), permutations, name, tuple(tensor.shape))
        result[name] = torch.from_numpy(turned_array(tensor.numpy(), indices).copy())
    return result


# ------------------------------------------------------------------------------------------------------ merging


def average(several: Sequence[Weights]) -> Weights:
    """The plain mean."""
    return {name: torch.stack([weights[name] for weights in several]).mean(0) for name in several[0]}


def task_arithmetic(base: Weights, several: Sequence[Weights], scale: float) -> Weights:
    """The base plus `scale` times the sum of the deltas."""
    return {name: start + scale * sum(weights[name] - start for weights in several) for name, start in base.items()}


def ties(base: Weights, several: Sequence[Weights], scale: float, density: float = 0.2) -> Weights:
    """Trim each delta per tensor, elect a sign by mass, average those that agree."""
    merged = {}
    for name, start in base.items():
        deltas = torch.stack([weights[name] - start for weights in several])
        sizes = deltas.abs().flatten(1)
        keep = max(1, round(density * sizes.shape[1]))
        cut = sizes.kthvalue(sizes.shape[1] - keep + 1, dim=1).values
        deltas = deltas * (deltas.abs() >= cut.view(-1, *[1] * start.dim()))
        agree = (deltas.sign() == deltas.sum(0).sign()) & (deltas != 0)
        merged[name] = start + scale * (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


def regmean(several: Sequence[Weights], data: Sequence[Data], diagonal: float = 0.9) -> Weights:
    """W = Σ Wᵢ Gᵢ (Σ Gᵢ)⁻¹, Gᵢ = XᵢᵀXᵢ of what the layer reads, off-diagonals times `diagonal`; biases averaged."""
    merged = average(several)
    for layer in [*LAYERS, "head"]:
        above, below = 0.0, 0.0
        for weights, own in zip(several, data, strict=True):
            x = reads(weights, layer, own.x).double()
            gram = x.T @ x
            gram = diagonal * gram + (1 - diagonal) * gram.diagonal().diag()
            above, below = above + weights[f"{layer}.weight"].double() @ gram, below + gram
        ridge = 1e-6 * below.diagonal().mean() * torch.eye(len(below), dtype=torch.float64)
        merged[f"{layer}.weight"] = torch.linalg.solve(below + ridge, above.T).T.float()
    return merged


def dam(
    several: Sequence[Weights],
    data: Sequence[Data],
    *,
    by_column: bool = True,
    similarity: float = 0.01,
    steps: int = 200,
    rate: float = 1e-2,
    temperature: float = 2.0,
) -> Weights:
    """DAM on full weights: W = Σ Wᵢ diag(cᵢ), trained so that the merge says of each task what its expert says."""
    matrices = [name for name, tensor in several[0].items() if tensor.dim() == 2]
    shapes = {name: (tensor.shape[1] if by_column else 1,) for name, tensor in several[0].items() if tensor.dim() == 2}
    shapes |= {name: (1,) for name in several[0] if name not in shapes}
    stacks = {name: torch.stack([weights[name] for weights in several]) for name in shapes}
    coefficients = {name: torch.full((len(several), *shape), 1 / len(several)) for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW([c.requires_grad_() for c in coefficients.values()], lr=rate, weight_decay=0.0)

    def merged() -> Weights:
        return {
            name: (stack * (coefficients[name][:, None] if stack.dim() == 3 else coefficients[name])).sum(0)
            for name, stack in stacks.items()
        }

    with torch.no_grad():
        teachers = [
            softmax(logits(weights, own.x) / temperature, 1) for weights, own in zip(several, data, strict=True)
        ]
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        weights, loss = merged(), torch.zeros(())
        for own, teacher in zip(data, teachers, strict=True):
            rows = torch.randint(len(own.x), (32,), generator=draw)
            said = log_softmax(logits(weights, own.x[rows]) / temperature, 1)
            loss = loss + temperature**2 * kl_div(said, teacher[rows], reduction="batchmean")
        for name in matrices if similarity and by_column else []:
            unit = torch.nn.functional.normalize(coefficients[name], dim=1)
            above = torch.triu_indices(len(several), len(several), 1)
            loss = loss + similarity * (unit @ unit.T)[above[0], above[1]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in merged().items()}


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
