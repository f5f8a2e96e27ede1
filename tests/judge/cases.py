"""The recipes on which tools and oracles are compared: a case is a recipe and what the oracle makes of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import oracles
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]
Tensors = dict[str, Array]
Oracle = Callable[[Array, list[Array]], Array]  # base, sources -> merged


@dataclass(frozen=True)
class Case:
    """One recipe over the models `base`, `first` and `second`, and its oracle for one tensor."""

    name: str
    recipe: str  # $base, $first and $second stand for folders
    oracle: Oracle

    def text(self, models: Mapping[str, Path]) -> str:
        """The recipe with the folders of the models filled in."""
        return fill(self.recipe, models)

    def expected(self, models: Mapping[str, Path]) -> Tensors:
        """The merged model as the oracle has it."""
        base, first, second = (tensors(models[name]) for name in ("base", "first", "second"))
        return {name: self.oracle(base[name], [first[name], second[name]]) for name in base}


def fill(recipe: str, models: Mapping[str, Path]) -> str:
    """A recipe with the folders of the models filled in."""
    return Template(recipe).substitute({name: str(folder) for name, folder in models.items()})


def tensors(folder: Path) -> Tensors:
    """All tensors of a model folder, widened to float64."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name in found:
                raise ValueError(f"{name} is in two files of {folder}")
            found[name] = tensor.astype(np.float64)
    return found


def furthest(merged: Tensors, expected: Tensors) -> float:
    """The largest difference, relative to the largest value of its tensor; infinite where names differ."""
    if merged.keys() != expected.keys():
        return np.inf
    return max(
        float(np.max(np.abs(merged[name] - expected[name])) / np.max(np.abs(expected[name]))) for name in expected
    )


def over_base(method: str, first: str, second: str, shared: str = "") -> str:
    """A recipe over a base and two sources: the parameters of each source, and the shared ones."""
    return f"""
merge_method: {method}
base_model: $base
models:
  - {{model: $first, parameters: {{{first}}}}}
  - {{model: $second, parameters: {{{second}}}}}
parameters: {{{shared}}}
dtype: float32
"""


def dare(method: str, rescale: bool) -> str:
    """A recipe over one source, of which a random mask keeps half."""
    return f"""
merge_method: {method}
base_model: $base
models:
  - {{model: $first, parameters: {{weight: 0.75, density: 0.5}}}}
parameters: {{rescale: {str(rescale).lower()}}}
dtype: float32
"""


LINEAR = """
merge_method: linear
models:
  - {model: $first, parameters: {weight: 0.75}}
  - {model: $second, parameters: {weight: 0.5}}
dtype: float32
"""
SLERP = """
merge_method: slerp
base_model: $base
models:
  - model: $base
  - model: $second
parameters: {t: 0.3}
dtype: float32
"""
PASSTHROUGH = """
merge_method: passthrough
models:
  - {model: $first, parameters: {scale: 0.5}}
dtype: float32
"""

CASES = (
    Case("linear", LINEAR, lambda base, sources: oracles.linear(sources, [0.75, 0.5])),
    Case(
        "linear, a plain sum",
        LINEAR + "parameters: {normalize: false}",
        lambda base, sources: oracles.linear(sources, [0.75, 0.5], normalize=False),
    ),
    Case("passthrough", PASSTHROUGH, lambda base, sources: oracles.passthrough(sources[0], 0.5)),
    Case("slerp", SLERP, lambda base, sources: oracles.slerp(base, sources[1], 0.3)),
    Case(
        "task_arithmetic",
        over_base("task_arithmetic", "weight: 0.75", "weight: -0.5", "lambda: 1.25"),
        lambda base, sources: oracles.task_arithmetic(base, sources, [0.75, -0.5], lambda_=1.25),
    ),
    Case(
        "task_arithmetic, normalized",
        over_base("task_arithmetic", "weight: 0.75", "weight: 0.5", "normalize: true"),
        lambda base, sources: oracles.task_arithmetic(base, sources, [0.75, 0.5], normalize=True),
    ),
    Case(
        "ties",
        over_base("ties", "weight: 1.0, density: 0.3", "weight: 0.5, density: 0.6", "lambda: 0.8"),
        lambda base, sources: oracles.ties(base, sources, [1.0, 0.5], [0.3, 0.6], lambda_=0.8),
    ),
    Case(
        "ties, equal weights",
        over_base("ties", "weight: 0.7, density: 0.2", "weight: 0.7, density: 0.2"),
        lambda base, sources: oracles.ties_paper(base, sources, 0.2),
    ),
    Case(
        "ties, a plain sum, one weight negative",
        over_base("ties", "weight: 1.0, density: 1.0", "weight: -0.5, density: 0.001", "normalize: false"),
        lambda base, sources: oracles.ties(base, sources, [1.0, -0.5], [1.0, 0.001], normalize=False),
    ),
)
