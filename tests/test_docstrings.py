"""Every public name is documented with an example, and every example runs as it stands."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import mergetool

EXAMPLES = Path(__file__).parent.parent / "examples"
TYPES = ("MergetoolError", "Plan", "Recipe", "Report")
"""What the verbs return or raise: documented, and shown in their examples."""


@pytest.mark.parametrize("name", [name for name in mergetool.__all__ if name not in TYPES])
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    documented = import_module("mergetool.methods") if name == "METHODS" else getattr(mergetool, name)
    public = {each: getattr(mergetool, each) for each in mergetool.__all__}
    found = [
        test for test in doctest.DocTestFinder(recurse=False).find(documented, name, globs=public) if test.examples
    ]
    assert found, f"the docstring of {name} has no example"

    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in found:
        assert runner.run(test).failed == 0


@pytest.mark.parametrize("name", TYPES)
def test_a_public_type_is_documented(name):
    assert getattr(mergetool, name).__doc__
