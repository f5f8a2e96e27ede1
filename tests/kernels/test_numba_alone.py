"""Loading Numba for our kernels brings no SciPy along, and takes nothing away from the kernels of others."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from mergetool.kernels import objects
objects._numba()
assert "scipy.linalg" not in sys.modules
import numba, numpy as np
@numba.njit
def product(a, b):
    return np.dot(a, b)
print(product(np.eye(2), np.ones((2, 2))).sum())
"""


def test_numba_comes_alone_and_its_linear_algebra_still_works():
    pytest.importorskip("scipy")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "4.0"), done.stderr
