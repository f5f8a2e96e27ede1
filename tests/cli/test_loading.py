"""The command line is loaded in pieces, so that it answers at once."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys
from mergetool.cli import main
sys.argv = ["mergetool", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = set({heavy!r}) & set(sys.modules)
assert not heavy, heavy
"""
HEAVY = ["torch", "numba", "transformers", "huggingface_hub", "tqdm"]


def answer(arguments, heavy, folder=None):
    code = SCRIPT.format(arguments=arguments, heavy=heavy)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    result = answer(arguments, [*HEAVY, "numpy", "pydantic", "yaml"])
    assert result.returncode == 0, result.stderr


def test_plan_imports_no_torch(folder):
    result = answer(["plan", "merge.yaml"], HEAVY, folder)
    assert result.returncode == 0, result.stderr


def test_help_answers_within_half_a_second():
    took = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mergetool.cli", "--help"], capture_output=True, check=True)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5
