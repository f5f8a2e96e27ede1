"""The networks of `digits.py` and how their data is read, in the two functions of an adapter.

A model that transformers does not know is run through such a file: a recipe names it under `calibration.adapter`,
and it is executed only with `--trust-code`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

BATCH = 256


class Mlp(nn.Module):
    """Linear layers with a ReLU behind each, then a linear head."""

    def __init__(self, inputs: int, hidden: list[int], classes: int) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [n, inputs] → logits [n, classes]."""
        for layer in self.layers:
            pixels = torch.relu(layer(pixels))
        return self.head(pixels)


def network(config: dict[str, Any]) -> nn.Module:
    """The network of a config, its parameters named as on disk."""
    return Mlp(config["input_size"], config["hidden_sizes"], config["num_labels"])


def read(path: Path, samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of at most `samples` images of a CSV file, a row for each: 64 pixels of 0 to 16, then the label."""
    rows = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:samples]
    pixels, labels = torch.from_numpy(rows[chosen, :-1] / 16), torch.from_numpy(rows[chosen, -1]).long()
    return [
        {"pixels": some, "labels": theirs}
        for some, theirs in zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
    ]
