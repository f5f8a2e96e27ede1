"""The table of dtypes against the safetensors library and torch."""

from __future__ import annotations

import ctypes

import pytest
import safetensors
import torch

from mergetool.errors import HeaderError
from mergetool.storage.dtypes import DTYPES, dtype


# The library reads 6-bit floats and cannot write them; test_reader_writer has it read ours.
@pytest.mark.parametrize("name", [name for name in DTYPES if not name.startswith("F6")])
def test_the_library_agrees_on_name_and_width(name):
    shape = (4, 8)
    nbytes = DTYPES[name].nbytes(shape)
    data = ctypes.create_string_buffer(nbytes)
    packed = (4, 4) if name == "F4" else shape  # the library takes torch's shape of packed pairs
    spec = safetensors.TensorSpec(
        dtype=DTYPES[name].torch_name, shape=packed, data_ptr=ctypes.addressof(data), data_len=nbytes
    )
    ((_, found),) = safetensors.deserialize(safetensors.serialize({"x": spec}))
    assert (found["dtype"], tuple(found["shape"]), len(found["data"])) == (name, shape, nbytes)


@pytest.mark.parametrize("name", [n for n in DTYPES if hasattr(torch, DTYPES[n].torch_name)])
def test_torch_agrees_on_name_and_width(name):
    found = getattr(torch, DTYPES[name].torch_name)
    per_torch_element = 2 if name == "F4" else 1
    assert found.itemsize * 8 == DTYPES[name].bits * per_torch_element
    assert found.is_floating_point == DTYPES[name].is_float
    assert dtype(DTYPES[name].torch_name) is dtype(name)


def test_raw_elements_have_the_width_of_the_dtype():
    for found in DTYPES.values():
        assert found.storage.itemsize * 8 == max(8, found.bits)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(HeaderError, match=r"unknown dtype 'F12'[\s\S]*BF16"):
        dtype("F12")


def test_packed_elements_must_fill_bytes():
    assert DTYPES["F4"].nbytes((3, 2)) == 3
    assert DTYPES["F6_E2M3"].nbytes((4,)) == 3
    with pytest.raises(HeaderError, match="whole bytes"):
        DTYPES["F4"].nbytes((3,))


def test_a_giant_shape_is_refused_before_it_grows():
    with pytest.raises(HeaderError, match="too large"):
        DTYPES["U8"].nbytes((10**4000,) * 1000)
    assert DTYPES["F32"].nbytes(()) == 4
    assert DTYPES["F32"].nbytes((5, 0)) == 0
