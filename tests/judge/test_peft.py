"""peft's merge functions on tensors, where their definitions and the oracles' agree.

peft merges task vectors: a base of zeros. Its TIES elects by the unweighted sum and divides by the number of
sources that agree, not by their weights; both are the oracle's TIES when every weight is 1.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracles
import pytest
from numpy.typing import NDArray

ZERO = np.zeros((9, 13))
SOURCES = np.random.default_rng(3).normal(size=(3, *ZERO.shape))


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def peft(torch: ModuleType) -> ModuleType:
    """`peft.utils.merge_utils` by itself: importing peft whole would import transformers and accelerate."""
    package = importlib.util.find_spec("peft")
    if package is None or not package.submodule_search_locations:
        pytest.skip("peft is not installed")
    path = Path(package.submodule_search_locations[0], "utils", "merge_utils.py")
    spec = importlib.util.spec_from_file_location("peft_merge_utils", path)
    if spec is None or spec.loader is None or not path.is_file():
        pytest.skip("this peft has no utils/merge_utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(torch: ModuleType, function: Callable[..., Any], weight: list[float], *arguments: Any) -> NDArray[np.float64]:
    merged = function([torch.from_numpy(s) for s in SOURCES], torch.tensor(weight, dtype=torch.float64), *arguments)
    return merged.numpy()


def same(actual: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-14)


def test_task_arithmetic(torch, peft):
    weight = [0.5, -1.0, 2.0]
    same(call(torch, peft.task_arithmetic, weight), oracles.task_arithmetic(ZERO, list(SOURCES), weight))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.77])
def test_magnitude_prune_is_the_trim(torch, peft, density):
    weight = [0.5, -1.0, 2.0]
    trimmed = [oracles.trim(source, density) for source in SOURCES]
    same(call(torch, peft.magnitude_prune, weight, density), oracles.combine(trimmed, weight, normalize=False))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.77])
def test_ties_with_weights_of_one(torch, peft, density):
    ours = oracles.ties(ZERO, list(SOURCES), 1.0, density)
    same(call(torch, peft.ties, [1.0] * 3, density, "total"), ours)
    same(ours, oracles.ties_paper(ZERO, list(SOURCES), density))


def test_ties_with_equal_weights_is_scaled_by_them_in_peft(torch, peft):
    same(call(torch, peft.ties, [0.5] * 3, 0.4, "total"), 0.5 * oracles.ties(ZERO, list(SOURCES), 0.5, 0.4))


def test_ties_with_unequal_weights_differs(torch, peft):
    weight = [0.5, -1.0, 2.0]
    ours = oracles.ties(ZERO, list(SOURCES), weight, 0.4)
    assert not np.allclose(call(torch, peft.ties, weight, 0.4, "total"), ours)


@pytest.mark.parametrize("consensus", [False, True])
def test_dare_rescales_by_the_density(torch, peft, consensus):
    density, weight = 0.4, [1.0, 1.0, 1.0]
    torch.manual_seed(0)
    if consensus:
        merged = call(torch, peft.dare_ties, weight, density, "total")
    else:
        merged = call(torch, peft.dare_linear, weight, density)
    torch.manual_seed(0)  # and draw its masks again
    masks = [torch.bernoulli(torch.full_like(torch.from_numpy(s), density)).numpy() == 1 for s in SOURCES]
    same(
        merged,
        oracles.dare(ZERO, list(SOURCES), masks, weight, density, True, consensus, normalize=consensus),
    )
