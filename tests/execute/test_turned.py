"""Turned reads are the turned tensor, wherever they begin and end; a function that changed is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergetool.anatomy import Group, Member, Turning
from mergetool.errors import CheckpointError, NonFinite, RunError
from mergetool.execute.turned import read_turned, turned_array, turned_get, verify
from mergetool.storage.header import read_header
from mergetool.storage.reader import Reader

SHAPES = {
    "vector": (37,),
    "matrix": (24, 80),
    "tall": (90, 5),
    "conv": (6, 7, 3, 3),
    "experts": (4, 12, 70),
    "small_experts": (4, 6, 5),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A reader, its entries, and the arrays themselves."""
    path = tmp_path_factory.mktemp("turned") / "model.safetensors"
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(arrays, path)
    with Reader(path) as reader:
        yield reader, read_header(path).entries, arrays


@st.composite
def turns(draw):
    """A tensor, index arrays for some of its axes, and a run of coordinates."""
    name = draw(st.sampled_from(sorted(SHAPES)))
    shape = SHAPES[name]
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    indices = {}
    for axis, length in enumerate(shape):
        how = draw(st.sampled_from(["stays", "moves", "blocks", "own"]))
        if how == "own" and len(shape) == 3 and axis:
            indices[axis] = np.stack([random.permutation(length) for _ in range(shape[0])])
        elif how == "blocks" and length % 2 == 0:
            halves = np.arange(length).reshape(2, -1)
            indices[axis] = halves[::-1].reshape(-1)
        elif how != "stays":
            indices[axis] = random.permutation(length)
    size = int(np.prod(shape))
    start = draw(st.integers(0, size))
    return name, indices, start, draw(st.integers(start, size))


@given(turns())
def test_any_run_of_a_turned_tensor_is_that_of_the_whole(file, turn):
    reader, entries, arrays = file
    name, indices, start, stop = turn
    expected = turned_array(arrays[name], indices).reshape(-1)[start:stop]

    np.testing.assert_array_equal(read_turned(reader, entries[name], indices, start, stop), expected)


def test_rows_that_lie_together_are_read_together(file, monkeypatch):
    reader, entries, arrays = file
    reads = []
    read_into = Reader.read_into
    monkeypatch.setattr(
        Reader, "read_into", lambda self, buffer, at: (reads.append(len(buffer)), read_into(self, buffer, at))
    )
    order = np.arange(24).reshape(3, 8)[[2, 0, 1]].reshape(-1)

    whole = np.empty(24 * 80, np.float32)
    assert read_turned(reader, entries["matrix"], {0: order}, into=whole) is whole
    np.testing.assert_array_equal(whole.reshape(24, 80), arrays["matrix"][order])
    assert reads == [8 * 80, 16 * 80]


def test_a_read_holds_no_more_than_its_run_and_one_line(file, monkeypatch):
    reader, entries, _ = file
    reads = []
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, *args: reads.append(args[2] - args[1]) or read(self, *args))

    read_turned(reader, entries["matrix"], {0: np.arange(24)[::-1], 1: np.arange(80)[::-1]}, 100, 900)
    assert max(reads) <= 80


def test_a_range_outside_the_tensor_is_refused(file):
    reader, entries, _ = file
    with pytest.raises(ValueError, match="not inside"):
        read_turned(reader, entries["vector"], {0: np.arange(37)[::-1]}, 30, 38)


def test_elements_narrower_than_a_byte_cannot_change_places(tmp_path):
    raw = b'{"w":{"dtype":"F4","shape":[4,4],"data_offsets":[0,8]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with Reader(path) as reader, pytest.raises(CheckpointError, match="cannot change places"):
        read_turned(reader, read_header(path).entries["w"], {0: np.arange(4)[::-1]})


UNITS = Group("units", "units", 16, (Member("up", 0, 1, 0, 16), Member("down", 1, 1, 0, 16)))


def network():
    random = np.random.default_rng(0)
    tensors = {"up": random.normal(size=(16, 4)), "down": random.normal(size=(3, 16))}
    inputs = random.normal(size=(10, 4))
    return tensors, lambda get: np.tanh(inputs @ get("up").T) @ get("down").T


def test_a_symmetry_is_verified():
    tensors, outputs = network()
    turning = Turning((UNITS,), {"units": np.random.default_rng(1).permutation(16)})

    assert 0 <= verify(outputs, tensors.__getitem__, turning) < 1e-12
    assert verify(lambda get: [outputs(get), outputs(get)], tensors.__getitem__, turning) < 1e-12
    assert not np.array_equal(turned_get(tensors.__getitem__, turning)("up"), tensors["up"])


def test_what_is_no_symmetry_is_noticed():
    tensors, outputs = network()
    half = Group("units", "units", 16, UNITS.members[:1])

    with pytest.raises(RunError, match="another function"):
        verify(outputs, tensors.__getitem__, Turning((half,), {"units": np.arange(16)[::-1]}))


def test_a_few_rows_may_be_excused():
    tensors, outputs = network()

    def rerouted(get):
        result = outputs(get)
        if not np.array_equal(get("up"), tensors["up"]):
            result[3:5] += 1
        return result

    turning = Turning((UNITS,), {"units": np.random.default_rng(1).permutation(16)})
    assert verify(rerouted, tensors.__getitem__, turning, excused=0.2) < 1e-12
    with pytest.raises(RunError, match="another function"):
        verify(rerouted, tensors.__getitem__, turning, excused=0.1)


def test_outputs_that_are_not_finite_are_no_proof():
    tensors, outputs = network()
    tensors["up"][0] = np.nan
    with pytest.raises(NonFinite):
        verify(outputs, tensors.__getitem__, Turning((UNITS,), {}))


def test_a_turned_model_with_nan_is_another_function():
    tensors, outputs = network()

    def broken(get):
        result = outputs(get)
        return result if np.array_equal(get("up"), tensors["up"]) else result * np.nan

    with pytest.raises(RunError, match="another function"):
        verify(broken, tensors.__getitem__, Turning((UNITS,), {"units": np.arange(16)[::-1]}))
