"""Damaged headers on disk and damaged recipes end in our own errors, soon and in bounded memory.

What is arbitrary from the start is in `tests/storage` and `tests/recipe`; here real files are damaged. The longer run
is a command: `python -m tests.reliability.fuzz header --seconds 600`.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.errors import HeaderError
from mergetool.recipe import load
from mergetool.storage.header import read_header

from .fuzz import NASTY, WORD, Edit, checker, corpus_of, relength

CORPUS = {target: corpus_of(target) for target in ("header", "recipe")}
TOKENS = {target: sorted({word for content in CORPUS[target] for word in WORD.findall(content)}) for target in CORPUS}


@st.composite
def damaged(draw: st.DrawFn, target: str) -> bytes:
    """A real input with one to four changes, most of them to a word."""
    content = draw(st.sampled_from(CORPUS[target]))
    inserted = st.one_of(
        st.sampled_from(TOKENS[target]), st.sampled_from(NASTY[target]), st.binary(max_size=8), st.just(b"")
    )
    for _ in range(draw(st.integers(1, 4))):
        words = list(WORD.finditer(content))
        if words and draw(st.integers(0, 3)):
            word = draw(st.sampled_from(words))
            edit = Edit(word.start(), len(word[0]), draw(inserted))
        else:
            edit = Edit(draw(st.integers(0, len(content))), draw(st.integers(0, 60)), draw(inserted))
        content = edit.on(content)
    return relength(content) if target == "header" and draw(st.booleans()) else content


@pytest.mark.parametrize("target", ["header", "recipe"])
def test_real_files_that_were_damaged_give_nothing_but_our_own_errors(
    target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check = checker(target, tmp_path_factory.mktemp("fuzz"))

    @given(damaged(target))
    @settings(max_examples=400)
    def feed(content: bytes) -> None:
        check(content)

    feed()


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 64).filter(lambda n: n < 1 << 64), st.binary(max_size=24))
@settings(max_examples=150)
def test_a_header_takes_no_memory_that_its_file_does_not_have(
    tmp_path_factory: pytest.TempPathFactory, size: int, length: int, text: bytes
) -> None:
    path = tmp_path_factory.mktemp("sizes") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text)
    if length > 1 << 20 and 8 + length <= size:
        length = 1 << 20  # that many bytes are read, and are refused at the first zero
        path.write_bytes(struct.pack("<Q", length) + text)
    os.truncate(path, size)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


MIB = 1 << 20
HOSTILE = {
    "empty objects": b'{"a":[' + b"{}," * (MIB // 3) + b"{}]}",
    "empty lists": b'{"a":[' + b"[]," * (MIB // 3) + b"[]]}",
    "small numbers": b'{"a":[' + b"1e9," * (MIB // 4) + b"0]}",
    "tensors": b"{" + b",".join(b'"%d":{}' % n for n in range(MIB // 11)) + b"}",
    "keys": b"{" + b",".join(b'"%x":0' % n for n in range(MIB // 9)) + b"}",
    "strings": b'{"a":[' + b'"abc",' * (MIB // 6) + b"0]}",
    "axes": b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":[' + b"0," * (MIB // 2) + b"0]}}",
    "a long name": b'{"' + b"a" * MIB + b'":0}',
    "escapes": b'{"a":"' + b"\\u00e9" * (MIB // 6) + b'"}',
    "wide characters": '{"a":"😀'.encode() + b"a" * MIB + b'"}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_takes_at_most_a_fixed_multiple_of_its_size(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError) as refused:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(text)
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 10_000


@pytest.mark.parametrize("metadata", [b'{"a":"\\ud800"}', b'{"\\ud800":"a"}'])
def test_metadata_that_is_no_unicode_is_refused_as_the_library_does(tmp_path: Path, metadata: bytes) -> None:
    text = b'{"__metadata__":' + metadata + b"}"
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(HeaderError, match="not valid Unicode"):
        read_header(path)


def test_what_a_hostile_recipe_takes_is_bounded_by_its_values_and_not_by_its_aliases() -> None:
    from mergetool.errors import RecipeError

    lines = ["a0: &a0 [" + "x, " * 50 + "x]"]
    lines += [f"a{i}: &a{i} [" + f"*a{i - 1}, " * 50 + "x]" for i in range(1, 30)]
    tracemalloc.start()
    try:
        with pytest.raises(RecipeError):
            load("\n".join(lines))
        assert tracemalloc.get_traced_memory()[1] < 200 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("target", ["header", "recipe"])
def test_the_command_feeds_inputs_and_says_how_many(target: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.reliability.fuzz", target, "--engine", "own", "--seconds", "0.5"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--findings", str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{target} by own: " in done.stdout
    assert not list(tmp_path.glob("*/*"))


def test_the_corpus_itself_is_accepted(tmp_path: Path) -> None:
    for target, contents in CORPUS.items():
        assert contents
        for content in contents:
            checker(target, tmp_path)(content)
    assert json.loads(CORPUS["header"][0][16:])
