"""Two outputs compared weight by weight, and the parts of the page that other machines than the usual one fill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from plan.models import save

from mergetool.kernels.rounding import narrow

from . import agreement, cores, gpu
from .agreement import CLOSE, Agreement, compare, merge

BASE = np.array([1.0, -2.0, 0.0, 0.5])


def output(folder, values, dtype="BF16", name="w"):
    save(folder, {name: (dtype, narrow(np.asarray(values), dtype))})
    return folder


def test_outputs_that_are_the_same_do_not_differ(tmp_path):
    found = compare(output(tmp_path / "a", BASE), output(tmp_path / "b", BASE * [1, 1, -1, 1]))  # zeros of both signs
    assert found == Agreement(4, 0, 0, 0.0)


def test_steps_are_the_numbers_between_also_across_zero(tmp_path):
    one = output(tmp_path / "a", [1.0, 2.0**-133, 0.5, 0.5])
    other = output(tmp_path / "b", [1.0, -(2.0**-133), 0.5 + 2.0**-8, 0.5])
    found = compare(one, other)
    assert (found.weights, found.unequal, found.steps) == (4, 2, 2)
    assert found.relative == pytest.approx(2.0**-8 / np.sqrt(1.5), rel=0.01)


def test_outputs_of_other_tensors_are_refused(tmp_path):
    one = output(tmp_path / "a", BASE)
    for number, other in enumerate(({"dtype": "F32"}, {"name": "v"})):
        with pytest.raises(ValueError, match="w BF16"):
            compare(one, output(tmp_path / f"b{number}", BASE, **other))
    save(tmp_path / "more", {name: ("BF16", narrow(BASE, "BF16")) for name in ("w", "x")})
    with pytest.raises(ValueError, match=r"shorter|longer"):
        compare(one, tmp_path / "more")


def test_what_rests_on_networks_may_be_a_little_apart_and_nothing_else():
    assert Agreement(9, 5, 99, CLOSE).within("dam")
    assert not Agreement(9, 5, 1, 2 * CLOSE).within("dam")
    assert Agreement(9, 0, 0, 0.0).within("ties")
    assert not Agreement(9, 1, 1, 1e-9).within("ties")


def test_every_example_is_told_of(monkeypatch, tmp_path):
    first, second = agreement.EXAMPLES[:2]

    def merge(recipe, output, device, cache):
        save(output, {"w": ("BF16", narrow(BASE, "BF16"))})
        return "" if recipe is first else f"{recipe.stem} failed"

    monkeypatch.setattr(agreement, "EXAMPLES", (first, second))
    monkeypatch.setattr(agreement, "merge", merge)
    found = agreement.every("cuda")
    assert found[first.stem] == {"weights": 4, "unequal": 0, "steps": 0, "relative": 0.0}
    assert found[second.stem]["wrong"].count("failed") == 2


def test_an_example_that_takes_too_long_is_ended_and_says_where_it_was(monkeypatch, tmp_path):
    assert merge(Path("nowhere.yaml"), tmp_path / "out", "cpu", tmp_path).startswith("nowhere.yaml on cpu ended with")
    monkeypatch.setattr(agreement, "LONGEST", 0.3)
    assert "File" in merge(agreement.EXAMPLES[0], tmp_path / "out", "cpu", tmp_path)


def rows(page, first):
    return [line for line in page.splitlines() if line.startswith(f"| `{first}`")]


def test_the_page_of_a_gpu():
    cost = {"source_read_MB": 5000.0}
    results = {
        "link": {"to": 50.0, "back": 49.0, "to while back": 40.0},
        "kernels": {"ties": {"1": 20.0, "2": 40.0, "4": 30.0, "8": 10.0, "torch": 5.0}},
        "costs": {
            "ties": {
                "gpu 2": [{"engine_s": 2.0, **cost}],
                "gpu 4": [{"engine_s": 1.0, **cost}],
                "cpu": [{"engine_s": 3.0, **cost}],
                "floor": [{"engine_s": 0.5, **cost}],
            }
        },
        "matrix": {"cpu": 1.0, "cuda": 0.25, "relative": 1e-15},
        "agreement": {
            "ties": {"weights": 10, "unequal": 3, "steps": 2, "relative": 0.0},
            "linear": {"weights": 10, "unequal": 0, "steps": 0, "relative": 0.0},
            "dam": {"wrong": "it failed"},
        },
    }
    page = gpu.page(results)
    kernel, merge, apart = rows(page, "ties")
    assert kernel == "| `ties` | 20.0 | 40.0 | 30.0 | 10.0 | 80% | 5.00 |"
    assert merge == "| `ties` | 2.00 | 1.00 | 3.00 | 0.50 | 5.00 | 10% | 20% |"
    assert "further apart" in apart
    assert "as expected" in rows(page, "linear")[0]
    assert "failed" in rows(page, "dam")[0]
    assert "0.25 s on the GPU" in page


def test_the_page_of_many_cores():
    assert cores.counts(1) == ["1"]
    assert cores.counts(2) == ["1", "2"]
    assert cores.counts(16) == ["1", "2", "4", "8", "16"]
    costs = {"ties": {"1": [{"engine_s": 4.0}], "2": [{"engine_s": 2.0}], "4": [{"engine_s": 1.6}]}}
    page = cores.page({"costs": costs, "settings": {"cores": 4}})
    assert rows(page, "ties") == ["| `ties` | 4.00 | 2.00 | 1.60 | 2.00 | 2.50 | met |"]
