"""Devices: which there are, how several are dealt out, and what buffers they get."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from mergetool.errors import PlanError, RunError
from mergetool.execute.align_match import adding_on
from mergetool.execute.buffers import aligned
from mergetool.execute.devices import Several, backend_for, gpu_memory, memory_for, torch_names
from mergetool.facts.matching_weights import ROWS
from mergetool.kernels.backend import Layout

LAYOUT = Layout(True, ("F32", "F32"))


class Named:
    """A backend that says which it is."""

    def __init__(self, name):
        self.name = name

    def between(self, layout):
        return lambda *arguments: (self.name, arguments)


def test_every_worker_has_one_device_and_all_devices_have_workers():
    backend, workers = Several([Named("a"), Named("b")]), 4
    kernel, together = backend.between(LAYOUT), Barrier(workers)

    def worker(_):
        together.wait(30)
        return [kernel(i) for i in range(5)]

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(worker, range(workers)))
    assert all(len({name for name, _ in each}) == 1 for each in found), "a worker keeps its device"
    assert sorted(each[0][0] for each in found) == ["a", "a", "b", "b"]
    assert [arguments for _, arguments in found[0]] == [(i,) for i in range(5)]


def test_a_device_that_is_not_there_is_refused_also_among_others():
    for device in ("tpu", "cuda:99", "cpu,cuda:99"):
        with pytest.raises(PlanError):
            backend_for(device)


def test_the_processor_takes_ordinary_pages():
    for device in ("cpu", "torch:cpu", "torch:cpu,torch:cpu"):
        assert memory_for(device) is aligned


def test_several_devices_count_alike():
    x = np.arange(64, dtype=np.float32)
    inputs, low, high = (np.zeros_like(x), x), np.zeros(1, np.uint32), np.full(1, 0x41200000, np.uint32)
    for device in ("cpu", "torch:cpu", "cpu,torch:cpu"):
        found, used = np.zeros((1, 64), np.uint32), np.zeros(1, np.int64)
        backend_for(device).between(LAYOUT)(inputs, low, high, found, used)
        assert used == [10]


def test_products_of_rows_are_added_up_alike_on_every_device():
    random = np.random.default_rng(0)
    left, right = random.normal(size=(2, ROWS + 5, 30)).astype(np.float32)
    for device in ("cpu", "cpu:0"):
        scores = np.ones((ROWS + 5, ROWS + 5), np.float32)
        adding_on(device)(scores, left, right)
        np.testing.assert_allclose(scores, 1 + left.astype(float) @ right.T.astype(float), atol=1e-4)


def test_devices_are_named_as_torch_names_them():
    assert torch_names("torch:cpu") == torch_names("cpu") == "cpu"
    assert torch_names("cuda:0, cuda:1") == "cuda:0,cuda:1"


def test_matrices_are_solved_on_the_first_device():
    assert backend_for("cpu").matrices == backend_for("torch:cpu,cpu").matrices == "cpu"
    assert backend_for("torch:cpu:0,cpu").matrices == "cpu:0"


def test_a_gpu_without_room_is_told_as_an_error_of_the_run():
    @gpu_memory()
    def work(error):
        raise error

    with pytest.raises(RunError, match="the GPU has no room: tried") as told:
        work(torch.OutOfMemoryError("tried to take 9 GiB\nand more"))
    assert "--workers" in told.value.problems[0].fix
    with pytest.raises(ValueError, match="another"):
        work(ValueError("another"))
