"""mergekit 0.1.5 on real checkpoints: it judges the oracles, which judge everything else.

mergekit computes in float32, the oracles in float64 from the same stored values. `furthest` is
relative to the largest value of a tensor, so 1e-6 is about sixteen roundings to float32.
"""

from pathlib import Path

import numpy as np
import oracles
import pytest

import mergetool

from .cases import CASES, Case, dare, fill, furthest, tensors
from .mergekit_env import mergekit_merge

TOLERANCE = 1e-6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session", params=CASES, ids=[case.name for case in CASES])
def judged(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Path]:
    """A case and what mergekit makes of it: merged once, for every test that asks."""
    case: Case = request.param
    return case, mergekit_merge(case.text(models), tmp_path_factory.mktemp("mergekit") / "merged")


def test_the_oracle_agrees_with_mergekit(judged, models):
    case, merged = judged
    assert furthest(tensors(merged), case.expected(models)) < TOLERANCE


def test_mergetool_agrees_with_mergekit_on_the_same_recipe(judged, models, tmp_path):
    case, merged = judged
    mergetool.run(mergetool.build(mergetool.load(case.text(models))), tmp_path / "out")
    assert furthest(tensors(tmp_path / "out"), tensors(merged)) < TOLERANCE


def test_slerp_is_tried_on_both_sides_of_its_threshold(models):
    base, second = tensors(models["base"]), tensors(models["second"])
    cosines = [
        np.sum(base[name] * second[name]) / np.linalg.norm(base[name]) / np.linalg.norm(second[name]) for name in base
    ]
    assert min(cosines) < oracles.COLINEAR < max(cosines)
    assert min(abs(cosine - oracles.COLINEAR) for cosine in cosines) > 1e-5  # float32 cannot mistake the side


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_oracle_of_dare_agrees_with_mergekit_given_its_mask(method, rescale, models, tmp_path):
    recipe = fill(dare(method, rescale), models)
    merged = tensors(mergekit_merge(recipe, tmp_path / "merged", "--random-seed", "1"))
    base, first = tensors(models["base"]), tensors(models["first"])
    mask = {name: merged[name] != base[name] for name in base}  # kept is what changed

    def expected(rule):
        consensus = method == "dare_ties"
        return {
            name: oracles.dare(base[name], [first[name]], [mask[name]], 0.75, 0.5, rule, consensus) for name in base
        }

    assert 0.45 < np.mean(np.concatenate([m.ravel() for m in mask.values()])) < 0.55
    assert furthest(merged, expected("l1" if rescale else False)) < TOLERANCE
    assert furthest(merged, expected(True)) > 100 * TOLERANCE  # 1/density, the paper's rule, it has not
