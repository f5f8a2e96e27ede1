"""Results on their way to the disk: nothing is lost, nobody waits for ever, direct or not the bytes are the same."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergetool.errors import RunError
from mergetool.execute import run
from mergetool.execute.outlet import FileSink, Outlet
from mergetool.execute.tiles import Stopped
from mergetool.plan import build
from mergetool.recipe import load
from mergetool.storage import system
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.writer import DIRECT_BYTES, Writer, shard

RECIPE = "merge_method: linear\nmodels:\n- model: {}\n- model: {}\nparameters: {{weight: 0.5}}\ndtype: bfloat16\n"


@pytest.fixture
def models(tmp_path):
    """Large tensors with small ones between them, so that pieces begin and end anywhere in a page."""
    shapes = {"a": (700, 1001), "b": (3,), "c": (1 << 20,), "d": (77,), "e": (999, 501), "f": (2, 200_003)}
    for name, seed in (("one", 1), ("two", 2)):
        draw = torch.Generator().manual_seed(seed)
        (tmp_path / name).mkdir()
        weights = {key: torch.randn(shape, generator=draw).bfloat16() for key, shape in shapes.items()}
        weights["g"] = torch.arange(300_001, dtype=torch.int8)
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    return tmp_path


def merged(models, output):
    (models / "recipe.yaml").write_text(RECIPE.format(models / "one", models / "two"))
    run(build(load(models / "recipe.yaml")), output)
    return (output / "model.safetensors").read_bytes()


def test_the_bytes_do_not_depend_on_direct_writes(models, monkeypatch):
    usual = merged(models, models / "usual")
    true = system.open_file

    def refuse(path, how, *mode):
        if how & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true(path, how, *mode)

    monkeypatch.setattr(system, "open_file", refuse)
    assert merged(models, models / "plain") == usual


def test_a_disk_that_fills_up_behind_the_workers_stops_the_run(models, monkeypatch):
    true, seen = system.pwrite, []

    def full(fd, view, offset):
        if len(view) >= DIRECT_BYTES:
            seen.append(offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true(fd, view, offset)

    monkeypatch.setattr(system, "pwrite", full)
    with pytest.raises(RunError, match="full"):
        merged(models, models / "out")
    assert seen
    assert not (models / "out").exists()
    monkeypatch.undo()
    usual = merged(models, models / "usual")
    assert merged(models, models / "out") == usual


def test_buffers_come_back_from_a_write_that_failed(tmp_path, monkeypatch):
    (part,) = shard([("t", DTYPES["U8"], (DIRECT_BYTES * 8,))], 1 << 30)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Writer(tmp_path / "m", part) as writer, Outlet(DIRECT_BYTES, 1, threading.Event()) as outlet:
        monkeypatch.setattr(system, "pwrite", fail)
        sink = FileSink(outlet, writer, part.header.data_start, lambda nbytes: None)
        for i in range(8):  # more than there are buffers
            sink.put(i * DIRECT_BYTES, sink.take(i * DIRECT_BYTES, DIRECT_BYTES))
        with pytest.raises(RunError):
            sink.wait()


def test_nobody_waits_for_a_buffer_when_the_run_is_given_up():
    stop = threading.Event()
    with Outlet(8, 1, stop) as outlet:
        for _ in range(3):
            outlet.take()
        stop.set()
        with pytest.raises(Stopped):
            outlet.take()


def test_a_buffer_begins_where_within_a_page_it_will_on_disk(tmp_path):
    (part,) = shard([("t", DTYPES["U8"], (100_000,))], 1 << 30)
    with Writer(tmp_path / "m", part) as writer, Outlet(100, 2, threading.Event()) as outlet:
        for offset, expected in ((4096, 0), (4096 + 24, 24), (4096 + 3, 0), (8192 - 8, 4088)):
            sink = FileSink(outlet, writer, offset, lambda nbytes: None)
            raw = sink.take(0, 100)
            assert raw.ctypes.data % system.PAGE == expected
            raw[:] = np.uint8(1)
            sink.put(0, raw)
