"""Merges of the bundled language models as mergetool makes them: on tensors in memory, or by a recipe and a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from language_models import DOMAINS, MODELS, WINDOW, Bench, Weights, load

import mergetool

TOKENS = 8192  # of calibration data from each domain, at most


def in_memory(bench: Bench, method: str, weight: Any = 1.0, seed: int = 0, **values: Any) -> Weights:
    """A merge by `merge_tensors`, for methods that need nothing but the models."""
    given = [list(weights.values()) for weights in bench.specialists.values()]
    more = {"parameters": {"weight": weight, **values}, "seed": seed, "sources": DOMAINS}
    return {
        name: mergetool.merge_tensors(method, [each[at] for each in given], base=start, name=name, **more)
        for at, (name, start) in enumerate(bench.base.items())
    }


@dataclass(frozen=True)
class Calibration:
    """Where the text files to calibrate with are, and how many tokens of each may be seen."""

    folder: Path
    tokens: int = TOKENS

    def recipe(self, method: str, seed: int, parameters: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe for the specialists, each with the text of its own domain; the seed draws the windows."""
        data = {
            name: {
                "path": str(self.folder / f"{name}.txt"),
                "samples": self.tokens // WINDOW,
                "max_length": WINDOW,
            }
            for name in DOMAINS
        }
        made: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(MODELS / name), "data": name} for name in DOMAINS],
            "calibration": {"data": data},
            "dtype": "bfloat16",
            "seed": seed,
        }
        if method == "dam":
            made |= {"base_model": str(MODELS / "base"), "train": {"seed": seed, **train}}
        return made | ({"parameters": dict(parameters)} if parameters else {})

    def run(self, method: str, seed: int, parameters: Mapping[str, Any] = {}, train: Mapping[str, Any] = {}) -> Weights:
        """Run such a recipe. What was measured or trained before is found among the facts and not made again."""
        with tempfile.TemporaryDirectory() as folder:
            # JSON is YAML.
            recipe = mergetool.load(json.dumps(self.recipe(method, seed, parameters, train)))
            return load(mergetool.run(mergetool.build(recipe), Path(folder) / "merged").output)
