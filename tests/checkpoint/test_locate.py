"""References: what is local, what is on the Hub, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergetool.checkpoint.locate import Location, Reference, locate, parse_reference
from mergetool.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference("org/name")),
        ("org/name@v1", Reference("org/name", "v1")),
        ("org/name@refs/pr/3", Reference("org/name", "refs/pr/3")),
        ("a/b+c/d", Reference("a/b", None, "c/d")),
        ("a/b@x+c/d@y", Reference("a/b", "x", "c/d@y")),
    ],
)
def test_a_reference_is_taken_apart(text, expected):
    assert parse_reference(text) == expected


@pytest.mark.parametrize("text", ["", "@x", "a@", "a@x@y", "a+", "a+b+c", "a+@x", "a+b@x@y"])
def test_a_reference_that_makes_no_sense_is_refused(text):
    with pytest.raises(CheckpointError, match="cannot be understood"):
        parse_reference(text)


def test_an_existing_path_wins_whatever_signs_it_holds(tmp_path, monkeypatch):
    (tmp_path / "c++@home").mkdir()
    assert locate("c++@home", tmp_path) == Location("c++@home", path=tmp_path / "c++@home")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/c++@home").path == tmp_path / "c++@home"


def test_the_folder_of_the_recipe_comes_before_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    assert locate("m", recipes).path == Path("m")
    (recipes / "m").mkdir()
    assert locate("m", recipes).path == recipes / "m"


def test_a_name_that_is_no_path_is_a_repo(tmp_path):
    assert locate("org/name@v1", tmp_path) == Location("org/name@v1", repo="org/name", revision="v1")
    assert locate("gpt2", tmp_path).repo == "gpt2"


@pytest.mark.parametrize("text", ["./absent", "/absent/model", "a/b/c", "../x", "models/absent", "-x/y", "a\0b"])
def test_what_can_only_be_a_path_must_exist(tmp_path, text):
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match="no such folder or file"):
        locate(text, tmp_path)


@pytest.mark.parametrize(("text", "near"), [("models/lama-chat", "models/llama-chat"), ("model", "models")])
def test_a_slip_of_the_pen_gets_the_nearest_name(tmp_path, text, near):
    (tmp_path / "models" / "llama-chat").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"did you mean {near}"):
        locate(text, tmp_path)


def test_adapters_and_local_revisions_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match=r"not supported yet[\s\S]*merge_and_unload"):
        locate("m+lora", tmp_path)
    with pytest.raises(CheckpointError, match="has no revisions"):
        locate("m@v1", tmp_path)
