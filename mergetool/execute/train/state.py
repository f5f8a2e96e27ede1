"""Where training stands: coefficients, moments, the best so far; written down so that a killed run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mergetool.execute.train.settings import Settings
from mergetool.facts.dam import Slot
from mergetool.storage.writer import atomic_write

STATE = "state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class State:
    """Where training stands.

    Attributes:
        values: what is trained, float32 [sources, ...], by the keys of the slots.
        optimizer: AdamW over them.
        step: how many steps are done.
        best: the values with the least KL on the held-out data.
        best_step: when that was.
        best_kl: that KL.
        waited: looks at the held-out data since then.
        curve: what each step and each look showed.
    """

    values: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    step: int = 0
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_step: int = 0
    best_kl: float = math.inf
    waited: int = 0
    curve: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"steps": [], "held_out": []})


def begin(slots: Iterable[Slot], sources: int, start: float, settings: Settings, device: Any) -> State:
    """Every coefficient at its start, in float32: in bfloat16 a step of 1e-3 from 1/3 would be lost or doubled.

    Args:
        slots: those of all weights; what is not trained is left out.
        sources: how many models are merged.
        start: what each begins at; rows that are added to columns begin at 0.
        settings: how they are trained.
        device: where they are kept.
    """
    values = {
        each.key: torch.nn.Parameter(
            torch.full(each.coefficients(sources), 0.0 if each.added else start, device=device)
        )
        for slot in slots
        for each in slot.sets
        if each.trained
    }
    # AdamW decays by 1e-2 unless told otherwise, which would draw every coefficient to zero.
    optimizer = torch.optim.AdamW(values.values(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    return State(values, optimizer)


def write(state: State, folder: Path, digest: str) -> None:
    """Write down where training stands, in one file, at once.

    Raises:
        RunError: the disk is full or fails.
    """
    tensors = {f"value/{key}": value.detach() for key, value in state.values.items()}
    tensors |= {f"best/{key}": value for key, value in state.best.items()}
    for key, value in state.values.items():
        moments = state.optimizer.state.get(value, {})
        tensors |= {f"{name}/{key}": moments[name] for name in _MOMENTS if name in moments}
    plain = {"digest": digest, "step": state.step, "best_step": state.best_step, "waited": state.waited}
    plain |= {"best_kl": None if math.isinf(state.best_kl) else state.best_kl, "curve": state.curve}
    held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(folder / STATE, save(held, metadata={"state": json.dumps(plain)}))


def resume(state: State, folder: Path, digest: str) -> bool:
    """Go on where a run of the same training stopped; whether there was one."""
    try:
        with safe_open(folder / STATE, "pt") as file:
            plain = json.loads((file.metadata() or {}).get("state", "{}"))
            if plain.get("digest") != digest:
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, ValueError):
        return False
    for key, value in state.values.items():
        with torch.no_grad():
            value.copy_(tensors[f"value/{key}"])
        found = {name: tensors[f"{name}/{key}"] for name in _MOMENTS if f"{name}/{key}" in tensors}
        if found:
            state.optimizer.state[value] = {n: t if n == "step" else t.to(value.device) for n, t in found.items()}
        if f"best/{key}" in tensors:
            state.best[key] = tensors[f"best/{key}"].to(value.device)
    state.step, state.best_step, state.waited = plain["step"], plain["best_step"], plain["waited"]
    state.best_kl = math.inf if plain["best_kl"] is None else plain["best_kl"]
    state.curve = plain["curve"]
    return True
