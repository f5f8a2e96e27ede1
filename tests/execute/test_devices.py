"""Devices: which there are, how several are dealt out, and what buffers they get."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from mergetool.errors import PlanError
from mergetool.execute.buffers import aligned
from mergetool.execute.devices import Several, backend_for, memory_for
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
