"""Headers: what is written is read back, what is hostile is refused, and the library sees the same file."""

from __future__ import annotations

import json
import os
import struct
from math import prod

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergetool.errors import CheckpointError, HeaderError
from mergetool.storage.density import outside_strings
from mergetool.storage.dtypes import DTYPES
from mergetool.storage.header import lay_out, parse, read_header

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda s: s != "__metadata__")
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


def tensors_of(drawn):
    found = []
    for name, (spelling, shape) in drawn.items():
        dtype = DTYPES[spelling]
        if prod(shape) * dtype.bits % 8:
            shape = [*shape, 4]
        found.append((name, dtype, tuple(shape)))
    return found


@given(TENSORS, st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"])), max_size=3))
@settings(max_examples=80, deadline=None)
def test_a_header_comes_back_as_it_was_laid_out(drawn, metadata):
    tensors = tensors_of(drawn)
    header, preamble = lay_out(tensors, metadata)
    assert (header, preamble) == lay_out(tensors, metadata)
    assert len(preamble) == header.data_start
    assert header.data_start % 8 == 0
    again = parse(preamble[8:], header.data_start, header.file_size, "x")
    assert again == header
    content = preamble + bytes(header.file_size - header.data_start)
    seen = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in safetensors.deserialize(content)}
    assert seen == {name: (d.name, shape, d.nbytes(shape)) for name, d, shape in tensors}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "x"]) | st.text(max_size=4), inner, max_size=4
        )
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F4", "F12", 3]),
        "shape": JSON | st.lists(st.integers(-1, 2**64), max_size=3),
        "data_offsets": JSON | st.lists(st.integers(-1, 2**64), min_size=2, max_size=2),
    }
)


@given(
    st.binary(max_size=60)
    | JSON.map(lambda v: json.dumps(v).encode())
    | st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3).map(lambda v: json.dumps(v).encode()),
    st.integers(0, 200),
)
@settings(max_examples=300, deadline=None)
@example(b'{"x":' + b"[" * 100_000, 100_013)
@example(b'{"x":' + b"9" * 5000 + b"}", 5020)
@example(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[' + b"9" * 4300 + b"," + b"9" * 4299 + b"8]}}", 9000)
@example(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 70)
def test_nothing_but_a_header_error_escapes(raw, extra):
    try:
        header = parse(raw, 8 + len(raw), 8 + len(raw) + extra, "x")
    except HeaderError as error:
        str(error).encode()
        return
    # What passes, the library reads too.
    content = struct.pack("<Q", len(raw)) + raw + bytes(extra)
    assert {name for name, _ in safetensors.deserialize(content)} == set(header.entries)


def refusal(document, data=0):
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(HeaderError) as caught:
        parse(raw, 8 + len(raw), 8 + len(raw) + data, "file")
    return str(caught.value)


def entry(shape, begin, end, dtype="U8", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


@pytest.mark.parametrize(
    ("document", "data", "message"),
    [
        (b"\xff\xfe", 0, "not UTF-8"),
        (b"\xef\xbb\xbf{}", 0, "not JSON"),
        (b"[]", 0, "not a JSON object"),
        (b'{"a":NaN}', 0, "NaN"),
        (b'{"a":1,"a":2}', 0, "key 'a' twice"),
        ({"__metadata__": {"format": 1}}, 0, "strings to strings"),
        ({"__metadata__": None}, 0, "strings to strings"),
        ({"a": entry([1], 0, 1, extra=1)}, 1, "exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "U8"}}, 0, "exactly dtype, shape and data_offsets"),
        ({"a": entry([1], 0, 1, "U9")}, 1, "unknown dtype 'U9'"),
        ({"a": entry([True], 0, 1)}, 1, "whole numbers"),
        ({"a": entry([1.0], 0, 1)}, 1, "whole numbers"),
        ({"a": entry([-1], 0, 1)}, 1, "whole numbers"),
        (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', 0, "whole numbers"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}', 0, "whole numbers"),
        ({"a": entry([1], False, 1)}, 1, "whole numbers"),
        ({"a": entry([1], 1, 0)}, 1, "whole numbers"),
        ({"a": entry([3], 0, 2)}, 2, "takes 3 bytes"),
        ({"a": entry([2**63, 2**63, 0], 0, 0)}, 0, "too large"),
        ({"a": entry([1], 0, 1), "b": entry([1], 2, 3)}, 3, "'b': leaves a hole before byte 1"),
        ({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, 3, "'b': overlaps another tensor at byte 1"),
        ({"a": entry([1], 1, 2)}, 2, "leaves a hole before byte 0"),
        ({"a": entry([8], 0, 8)}, 5, "is truncated: "),
        ({"a": entry([8], 0, 8)}, 9, "1 bytes after its last tensor"),
        ({}, 1, "1 bytes after its last tensor"),
    ],
)
def test_a_broken_header_is_named(document, data, message):
    assert message in refusal(document, data)


def test_all_broken_tensors_are_named_at_once():
    text = refusal({"a": entry([1], 0, 2), "b": entry([1], 0, 1, "Q")})
    assert "'a'" in text
    assert "'b'" in text


def test_zero_sized_tensors_may_stand_anywhere():
    document = {"b": entry([2], 0, 2), "a": entry([0], 2, 2), "c": entry([0, 3], 0, 0), "d": entry([], 2, 3)}
    raw = json.dumps(document).encode()
    header = parse(raw, 8 + len(raw), 8 + len(raw) + 3, "x")
    assert list(header.entries) == ["c", "b", "a", "d"]
    assert header.entries["d"].size == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: 0 bytes, at least 8 expected"),
        (b"\x08\0\0", "is truncated: 3 bytes, at least 8 expected"),
        (struct.pack("<Q", 40) + b"{}", "is truncated: 10 bytes, at least 48 expected"),
        (struct.pack("<Q", 2**63) + b"{}", "over the limit"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"PK\x03\x04\x00\x00\x08\x08", "PyTorch pickle"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"<!DOCTYPE html>", "web page"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(HeaderError, match=message):
        read_header(tmp_path / "x")


def test_a_path_without_a_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a file"):
        read_header(tmp_path / "pipe")


def test_names_that_cannot_be_laid_out():
    u8 = DTYPES["U8"]
    for names in (["a", "a"], ["__metadata__"], ["\ud800"]):
        with pytest.raises(HeaderError):
            lay_out([(name, u8, (1,)) for name in names], {})


@pytest.mark.parametrize(
    ("unit", "what"), [(b"{},", "objects"), (b"[],", "lists"), (b'"":0,', "keys"), (b"0,", "values")], ids=str
)
def test_a_header_with_more_than_tensors_need_is_refused_before_it_is_parsed(unit, what, monkeypatch):
    def parsed(*arguments):
        pytest.fail("it was parsed")

    monkeypatch.setattr("mergetool.storage.header.parse_object", parsed)
    text = b'{"a":{' + unit * 150_000 + b'"b":[0]}}'
    with pytest.raises(HeaderError, match=rf"holds 1(49|50),\d{{3}} {what}, more than tensors need"):
        parse(text, 8 + len(text), 8 + len(text), "x")


@given(st.lists(st.sampled_from(["\\", '"', "{", "[", ":", ",", "é", "a" * 9]), max_size=12).map("".join))
@settings(max_examples=60, deadline=None)
def test_what_strings_hold_is_no_structure(text):
    metadata = {"config": text, text + "x": json.dumps({text: [text, {}]})}
    _, preamble = lay_out([(text, DTYPES["U8"], (2,))], metadata)
    counts = outside_strings(preamble[8:])
    # {"__metadata__":{k:v,k:v},name:{"dtype":…,"shape":[2],"data_offsets":[0,2]}}
    assert counts == {ord("{"): 3, ord("["): 2, ord(":"): 7, ord(","): 5}


def test_metadata_that_is_json_itself_may_be_long():
    metadata = {"config": json.dumps({str(i): [{}, [i], "\\"] for i in range(40_000)})}
    header, preamble = lay_out([("a", DTYPES["U8"], (2,))], metadata)
    assert parse(preamble[8:], header.data_start, header.file_size, "x").metadata == metadata
