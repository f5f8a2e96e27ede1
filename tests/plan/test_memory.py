"""The plan states its peak as a sum that can be checked by hand, and refuses what it cannot keep."""

from __future__ import annotations

import re

import pytest

from mergetool.errors import PlanError
from mergetool.plan import memory
from plan.models import TIES, planned, sparse

MIB = 1 << 20
SIZE = 1 << 24


@pytest.fixture
def primes(monkeypatch):
    """Every constant of the formula a prime of its own, so that no term can hide another."""
    monkeypatch.setattr(memory, "INTERPRETER", 1_000_003)
    monkeypatch.setattr(memory, "COUNTS", 10_007)
    monkeypatch.setattr(memory, "SMALLEST_TILE", 101)
    monkeypatch.setattr(memory, "LARGEST_TILE", 101 * 7)
    monkeypatch.setattr(memory, "PREFERRED_RESIDENT", 1009)
    return memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three dtypes: a coordinate of the inputs takes 4 + 2 + 8 bytes."""
    folder = tmp_path_factory.mktemp("models")
    for name, dtype in (("base", "F32"), ("a", "BF16"), ("b", "F64")):
        sparse(folder / name, {"w": (SIZE,)}, dtype)
    return folder


INPUTS = 4 + 2 + 8
OUTPUT = 4
WRITTEN = memory.WRITERS * OUTPUT  # tiles of results that wait for the disk


def test_the_peak_is_the_interpreter_and_each_workers_tile_counts_and_tensor(primes, folder):
    plan = planned(folder, memory=10_000_000, workers=3)
    worker = 707 * (INPUTS + OUTPUT) + 3 * 10_007 + 1009
    assert plan.memory.peak == 1_000_003 + 3 * worker + 707 * WRITTEN
    assert (plan.memory.workers, plan.memory.tile, plan.memory.resident) == (3, 707, 1009)


def test_the_smallest_budget_is_one_worker_with_the_smallest_tile(primes, folder):
    least = 1_000_003 + 101 * (INPUTS + OUTPUT + WRITTEN) + 3 * 10_007
    plan = planned(folder, memory=least)
    assert (plan.memory.workers, plan.memory.tile, plan.memory.resident) == (1, 101, 0)
    assert plan.memory.peak == least
    with pytest.raises(PlanError, match="too small"):
        planned(folder, memory=least - 1)


def test_tiles_shrink_before_a_budget_is_refused(primes, folder):
    for tiles in range(1, 8):
        tile = 101 * tiles
        exact = 1_000_003 + 2 * (tile * (INPUTS + OUTPUT) + 3 * 10_007) + tile * WRITTEN
        assert planned(folder, memory=exact, workers=2).memory.tile == tile
        assert planned(folder, memory=exact, workers=2).memory.peak == exact


def test_no_more_is_held_than_the_largest_tensor(primes, folder, tmp_path):
    for name in ("base", "a", "b"):
        sparse(tmp_path / name, {"w": (11,), "v": (13,)})
    assert planned(tmp_path, memory=10_000_000, workers=1).memory.resident == 13 * 3 * 2


@pytest.mark.parametrize("budget", [0, 1, 100 * MIB, 200 * MIB])
def test_a_small_budget_is_refused_with_the_number_to_give(folder, budget):
    with pytest.raises(PlanError) as refused:
        planned(folder, memory=budget)
    (problem,) = refused.value.problems
    assert problem.where == "--memory"
    wanted = int(re.search(r"--memory (\d+)MiB", problem.fix)[1])
    assert planned(folder, memory=wanted * MIB).memory.peak <= wanted * MIB
    with pytest.raises(PlanError):
        planned(folder, memory=(wanted - 1) * MIB)


@pytest.mark.parametrize("workers", [2, 9, 40])
def test_a_budget_too_small_for_the_workers_asked_for_is_refused_with_the_number_to_give(folder, workers):
    with pytest.raises(PlanError) as refused:
        planned(folder, memory=216 * MIB, workers=workers)
    (problem,) = refused.value.problems
    assert f"{workers} workers" in problem.what
    wanted = int(re.search(r"--memory (\d+)MiB", problem.fix)[1])
    assert planned(folder, memory=wanted * MIB, workers=workers).memory.workers == workers
    with pytest.raises(PlanError):
        planned(folder, memory=(wanted - 1) * MIB, workers=workers)


def test_workers_give_way_to_a_small_budget(folder, monkeypatch):
    monkeypatch.setattr(memory, "default_workers", lambda: 64)
    found = [planned(folder, memory=budget * MIB).memory for budget in (216, 235, 260, 300, 400, 640)]
    assert [one.workers for one in found] == sorted(one.workers for one in found)
    assert found[0].workers == 1
    assert 1 < found[-1].workers < 64
    assert all(one.peak <= one.budget for one in found)


@pytest.mark.parametrize("budget", range(236, 900, 37))
@pytest.mark.parametrize("workers", [None, 1, 2])
def test_the_peak_never_exceeds_the_budget_and_tiles_are_whole_blocks(folder, budget, workers):
    found = planned(folder, TIES, memory=budget * MIB, workers=workers).memory
    assert found.peak <= found.budget == budget * MIB
    assert found.tile % memory.SMALLEST_TILE == 0
    assert memory.SMALLEST_TILE <= found.tile <= memory.LARGEST_TILE
    assert found.workers >= 1
    assert found.resident >= 0


def test_the_default_budget_does_not_grow_with_the_model(folder, tmp_path):
    for name in ("base", "a", "b"):
        sparse(tmp_path / name, {"w": (1 << 31,)})
    small, large = planned(folder).memory, planned(tmp_path).memory
    assert small.budget == large.budget <= memory.LARGEST_BUDGET
    assert large.peak <= large.budget


def test_small_tensors_that_are_read_together_are_counted_for_each_worker(primes, tmp_path, monkeypatch):
    for name in ("base", "a", "b"):
        sparse(tmp_path / name, {"w": (11,), "v": (13,), "large": (1 << 12,)})
    peaks = []
    for most in (0, 13 * 6, 24 * 6 - 1, 24 * 6, 1 << 20):
        monkeypatch.setattr(memory, "BATCH_BYTES", most)
        peaks.append(planned(tmp_path, memory=10_000_000, workers=3).memory.peak)
    assert [peak - peaks[0] for peak in peaks] == [
        0,
        3 * 13 * 6,
        3 * (24 * 6 - 1),
        3 * 24 * 6,
        3 * (24 + (1 << 12)) * 6,
    ]
