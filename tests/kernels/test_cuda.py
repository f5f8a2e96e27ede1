"""Kernels for NVIDIA's GPUs, built by a C++ compiler and run on the CPU: the bytes of the compiled kernels."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
from backends import BACKENDS
from kernels.cuda_on_host import COMPILER, stand_in
from methods.cases import make, merge, sources_of, variants
from methods.test_with_facts import COORDINATE, combined, extras_of

from mergetool.kernels.backend import BLOCK, FEW_THRESHOLDS, THRESHOLDS, Layout, with_torch
from mergetool.kernels.cuda_text import functions
from mergetool.kernels.language import maximum, minimum, sign, sqrt, where
from mergetool.kernels.rounding import READABLE, WRITABLE, narrow
from mergetool.kernels.torch_arrays import TorchArrays
from mergetool.methods import METHODS
from mergetool.methods.declare import Sums

compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
BARE = [name for name, method in METHODS.items() if method.reach == "coordinate" and not method.facts]


@pytest.fixture(scope="module")
def host():
    """The backend on the CPU, under the name `host` among the others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_in().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "mergetool.kernels.cuda", raising=False)
        backend = importlib.import_module("mergetool.kernels.cuda").Cuda("cpu")
        patch.setitem(BACKENDS, "host", backend)
        yield backend
        del sys.modules["mergetool.kernels.cuda"]


@compiler
@pytest.mark.parametrize("name", BARE)
def test_a_method_s_bytes(host, name):
    method = METHODS[name]
    for parameters, dtypes, output in zip(
        variants(method, sources_of(method, 2)), [("BF16",), ("F32", "F16")] * 3, ["BF16", "F32"] * 3, strict=False
    ):
        case = make(method, parameters, BLOCK + 321, dtypes, output, sources=2)
        (ours, bad), (expected, _) = merge(case, "host", BLOCK), merge(case, "compiled", BLOCK)
        np.testing.assert_array_equal(ours, expected)
        assert bad == 0


@compiler
@pytest.mark.parametrize("name", COORDINATE)
def test_the_bytes_of_a_method_with_facts(host, name):
    extras = extras_of("columns")
    np.testing.assert_array_equal(
        combined(name, host, "BF16", extras), combined(name, BACKENDS["compiled"], "BF16", extras)
    )


@compiler
def test_every_dtype_is_read_and_written(host):
    random = np.random.default_rng(4)
    for dtype in READABLE:
        raw = _every(dtype, random)
        for output in WRITABLE:
            results = []
            for backend in (BACKENDS["compiled"], host):
                out = narrow(np.full(raw.size, 7.0), output)
                kernel = backend.combine(_itself, ("value",), (), Layout(False, (dtype,), output))
                results.append((kernel(0, (raw,), out, (np.uint64(0),)), out))
            assert results[0][0] == results[1][0]
            np.testing.assert_array_equal(results[0][1], results[1][1])


def _itself(value):
    return value[0]


def _every(dtype, random):
    """Raw numbers of a dtype: all there are of the short ones, any bits of the long ones."""
    if dtype.startswith("F8"):
        return np.arange(256, dtype=np.uint8)
    if dtype in ("BF16", "F16"):
        return np.arange(1 << 16, dtype=np.uint16)
    bits = random.integers(0, 1 << 63, 1 << 16, np.uint64) * 2 + random.integers(0, 2, 1 << 16, np.uint64)
    return bits.view(np.float64) if dtype == "F64" else bits.astype(np.uint32).view(np.float32)


@compiler
def test_magnitudes_are_counted_and_gathered(host):
    random = np.random.default_rng(1)
    base = random.normal(size=5000)
    for dtypes in (("BF16", "BF16", "F32"), ("F64", "F16", "F64")):
        wide = [base, base + random.normal(size=5000) * 1e-3, -base]
        raw = tuple(narrow(x, dtype) for x, dtype in zip(wide, dtypes, strict=True))
        low = np.array([1e-3, 0.5], np.float32).view(np.uint32)
        high = np.array([2e-3, np.inf], np.float32).view(np.uint32)
        found = {}
        for name in ("compiled", "host"):
            backend, seen = BACKENDS[name], []
            for count in (THRESHOLDS, FEW_THRESHOLDS):
                counts = np.ones((2, count), np.int64)
                thresholds = np.linspace(low, high, count, axis=1).astype(np.uint32)
                backend.above(Layout(True, dtypes), count)(raw, thresholds, counts)
                seen.append(counts.tolist())
            gathered, used = np.zeros((2, 5007), np.uint32), np.array([7, 0])
            backend.between(Layout(True, dtypes))(raw, low, high, gathered, used)
            found[name] = seen, used.tolist(), [np.sort(row).tolist() for row in gathered]
        assert found["host"] == found["compiled"]


@compiler
def test_what_is_not_finite_is_counted_by_each_call(host):
    kernel = host.combine(_itself, ("value",), (), Layout(False, ("F32",), "BF16"))
    for bad in (3, 0, 1):
        raw, out = np.ones(100, np.float32), np.zeros(100, np.uint16)
        raw[:bad] = (np.nan, np.inf, 3.4e38)[:bad]
        assert kernel(0, (raw,), out, (np.uint64(0),)) == bad


@pytest.mark.parametrize("broken", [{"cuda.core": None}, {"Program": None}])
def test_without_a_compiler_for_it_torch_s_operations_are_taken_and_that_is_said(monkeypatch, broken):
    modules = stand_in()
    for name, value in broken.items():
        if name in modules:
            modules[name] = value
        else:
            monkeypatch.setattr(modules["cuda.core"], name, value)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mergetool.kernels.cuda", raising=False)
    with pytest.warns(RuntimeWarning, match="cuda:3: kernels are not compiled") as told:
        assert isinstance(with_torch.__wrapped__("cuda:3"), TorchArrays)
    assert ("docs/guide" in str(told[0].message)) == ("cuda.core" in broken)
    sys.modules.pop("mergetool.kernels.cuda", None)


@compiler
def test_nothing_is_made_of_nothing(host):
    for name in ("slerp", "ties", "dare_ties"):
        method = METHODS[name]
        case = make(method, variants(method, sources_of(method, 2))[1], 0, sources=2)
        out, bad = merge(case, "host")
        assert (out.size, bad) == (0, 0)


@compiler
def test_tiles_of_another_dtype_or_length_are_refused(host):
    kernel, key = host.combine(_itself, ("value",), (), Layout(False, ("F32",), "BF16")), (np.uint64(0),)
    for raw in (np.ones(8), np.ones(16, np.float32)[::2]):
        with pytest.raises(ValueError, match="a kernel takes 8 elements"):
            kernel(0, (raw,), np.zeros(8, np.uint16), key)


def test_every_text_of_the_catalogue_can_be_said_in_cpp():
    for name in (*BARE, *COORDINATE):
        method = METHODS[name]
        assert "whole_text" in functions(method.function, sources_of(method, 3))
        for measure in method.measures.values():
            if isinstance(measure, Sums):
                assert "whole_text" in functions(measure.terms, sources_of(method, 3))


HALF = 0.5


def _helper(x, flag):
    if flag:
        x = x * HALF
        y = x
    else:
        y = -x
    return y


def _many_words(base, value, *, flag, factor):
    signed = 1.0
    chosen = tuple(maximum(value[i], factor[i]) for i in range(len(value)))
    total = 0.0
    for i in range(len(value)):
        inside = 0.0 < value[i] <= 1.0
        total += where(inside & (base > -1.0), chosen[i], signed * sign(value[i]) / 3)
    return minimum(total, sqrt(abs(base))) if flag and not base > 2.0 else _helper(total, flag)


@compiler
@pytest.mark.parametrize("flag", [True, False])
def test_a_text_means_what_it_means_in_python(host, flag):
    random = np.random.default_rng(0)
    raw = tuple(random.normal(size=999) for _ in range(3))
    layout, results = Layout(True, ("F64",) * 3, "F64"), []
    for backend in (BACKENDS["compiled"], host):
        out = np.zeros(999)
        kernel = backend.combine(_many_words, ("base", "value"), ("flag", "factor"), layout)
        kernel(0, raw, out, (np.uint64(0),) * 2, flag, (0.25, 1))
        results.append(out)
    np.testing.assert_array_equal(*results)
    scalar = [_many_words(b, (v, w), flag=flag, factor=(0.25, 1)) for b, v, w in zip(*raw, strict=True)]
    np.testing.assert_array_equal(results[1], scalar)


def _powers(value):
    return value[0] ** 2


def _loops(value):
    total = 0.0
    while total < 1.0:
        total += value[0]
    return total


def _either(value):
    return value[0] or 1.0


def _flags(value):
    flag = value[0] > 0.0
    flag &= value[0] < 1.0
    return where(flag, 1.0, 0.0)


def _length(value):
    return value[0] / len(value)


def _slice(value):
    return value[:1][0]


ENDLESS = float("inf")


def _endless(value):
    return minimum(value[0], ENDLESS)


@pytest.mark.parametrize("text", [_powers, _loops, _either, _flags, _length, _slice, _endless])
def test_what_a_coordinate_text_may_not_say_is_refused(text):
    with pytest.raises(NotImplementedError, match="a coordinate text"):
        functions(text, 1)
