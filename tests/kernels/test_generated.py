"""A coordinate text becomes a small module of straight lines, cached under a name made from its content."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mergetool.kernels import compile, generated
from mergetool.kernels.arrays import NumpyArrays
from mergetool.kernels.backend import Layout
from mergetool.kernels.language import maximum, minimum, sign, sqrt, where
from mergetool.kernels.text import called, keyword_arguments, plain, positional_arguments
from mergetool.kernels.torch_arrays import TorchArrays

STEP = 0.25


def half(x: float) -> float:
    """A helper; its docstring and annotations are not part of the kernel."""
    return x * STEP * 2.0


def quarter(x):
    return half(half(x))


def text(base, delta, *, weight: tuple[float, ...], normalize: bool = True, unused: float = 1.0):
    """Add up."""
    total = 0.0
    for i in range(len(delta)):
        total += weight[i] * delta[i]
    parts = tuple(quarter(delta[i]) for i in range(len(delta)))
    if normalize:
        total = total / 2.0
    return base + where(total > parts[0], total, parts[0])


def pairs(value):
    best = 0.0
    for i in range(len(value)):
        for j in range(len(value)):
            best += value[i] * value[j]
    return best


def starred(delta):
    one = tuple(abs(delta[i]) for i in range(len(delta)))
    return (*one, 1.0)


def lines(source):
    return textwrap.dedent(source).strip()


def test_loops_over_the_sources_are_written_out():
    expected = """
    def text(base, delta, weight, normalize):
        total = 0.0
        total += weight[0] * delta[0]
        total += weight[1] * delta[1]
        parts = (quarter(delta[0]), quarter(delta[1]))
        if normalize:
            total = total / 2.0
        return base + where(total > parts[0], total, parts[0])
    """
    assert plain(text, 2, ("weight", "normalize")) == lines(expected)


def test_nested_loops_are_written_out_in_order():
    terms = "\n".join(f"        best += value[{i}] * value[{j}]" for i in range(2) for j in range(2))
    assert plain(pairs, 2) == lines(f"    def pairs(value):\n        best = 0.0\n{terms}\n        return best")


def test_a_starred_tuple_has_one_item_for_each_source():
    expected = """
    def starred(delta):
        one = (abs(delta[0]), abs(delta[1]), abs(delta[2]))
        return (one[0], one[1], one[2], 1.0)
    """
    assert plain(starred, 3) == lines(expected)


def test_a_text_names_its_tensors_before_the_star_and_its_parameters_after():
    assert positional_arguments(text) == ("base", "delta")
    assert keyword_arguments(text) == ("weight", "normalize", "unused")


def test_helpers_and_constants_are_found_deepest_first_also_inside_generators():
    assert list(dict(called(text))) == ["STEP", "half", "quarter"]


def write(*args):
    """Make a kernel anew, though the process has made it before."""
    generated.module.cache_clear()
    return getattr(compile.combine, "__wrapped__", compile.combine)(*args)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A kernel cache of this test alone."""
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path))
    generated.cache_folder.cache_clear()
    generated.module.cache_clear()
    yield tmp_path / "kernels"
    monkeypatch.undo()
    generated.cache_folder.cache_clear()
    generated.module.cache_clear()


GENERATED = '''"""text, generated from its text; do not edit."""

from mergetool.kernels.prelude import *  # noqa: F403


STEP = 0.25

@njit(error_model="numpy", forceinline=True)
def half(x):
    return x * STEP * 2.0

@njit(error_model="numpy", forceinline=True)
def quarter(x):
    return half(half(x))

@njit(error_model="numpy", forceinline=True)
def text(base, delta, weight, normalize):
    total = 0.0
    total += weight[0] * delta[0]
    parts = (quarter(delta[0]),)
    if normalize:
        total = total / 2.0
    return base + where(total > parts[0], total, parts[0])

@njit(nogil=True, cache=True, error_model="numpy")
def combine(start, inputs, out, keys, weight, normalize):
    x0, x1, = inputs
    bad = u32(0)
    for k in range(out.size):
        w0 = widen_BF16(x0[k])
        w1 = widen_F32(x1[k])
        base = w0
        delta = (w1 - w0,)
        result = narrow_BF16(text(base, delta, weight, normalize))
        out[k] = result
        bad = u32(bad + u32(strange_BF16(result) | strange_BF16(x0[k]) | strange_F32(x1[k])))
    return bad
'''


def test_a_kernel_is_a_module_one_can_read(cache):
    """Nothing is compiled before the first call, so this is cheap."""
    layout = Layout(True, ("BF16", "F32"), "BF16")
    write(text, ("base", "delta"), ("weight", "normalize"), layout)
    (path,) = cache.glob("*.py")
    assert path.read_text() == GENERATED
    assert path.name.startswith("text_")


def test_another_text_or_layout_is_another_file_and_the_same_is_the_same(cache):
    def make(function, output="F32", sources=2):
        write(function, ("value",), (), Layout(False, ("F32",) * sources, output))
        return {path.name for path in cache.glob("*.py")}

    first = make(pairs)
    assert make(pairs) == first
    assert len(make(pairs, "BF16")) == 2
    assert len(make(pairs, sources=3)) == 3
    changed = type(pairs)(plain_two.__code__, globals(), "pairs")
    assert len(make(changed)) == 4
    assert not list(cache.glob("*.tmp"))


def plain_two(value):
    return value[0] * 2.0


def test_a_kernel_made_by_another_version_of_the_prelude_is_not_used(cache, monkeypatch):
    write(pairs, ("value",), (), Layout(False, ("F32",), "F32"))
    monkeypatch.setattr(generated, "_prelude", lambda: "another")
    write(pairs, ("value",), (), Layout(False, ("F32",), "F32"))
    assert len(list(cache.glob("*.py"))) == 2


def test_a_cache_that_cannot_be_written_is_replaced_by_a_folder_for_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(generated.tempfile, "tempdir", str(tmp_path))
    folder = generated.cache_folder.__wrapped__()
    assert folder.is_dir()
    assert folder.parent == tmp_path
    assert folder.name.startswith("mergetool-kernels-")


def test_the_cache_is_the_environment_s_or_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MERGETOOL_CACHE")
    assert generated.cache_folder.__wrapped__() == tmp_path / "xdg" / "mergetool" / "kernels"
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "own"))
    assert generated.cache_folder.__wrapped__() == tmp_path / "own" / "kernels"


def test_threads_may_make_kernels_at_once(cache):
    """Workers do; each kernel is made once, and asking again gives the same."""
    layouts = [Layout(False, ("F64",) * sources, "F32") for sources in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda layout: compile.combine(pairs, ("value",), (), layout), layouts * 4))
    assert len(set(made)) == len(layouts)
    assert made[: len(layouts)] * 4 == made
    assert len(list(cache.glob("*.py"))) == len(layouts)


COMPILE_AND_RUN = """
import sys
import numpy as np
from mergetool.kernels import compile, generated
from mergetool.kernels.backend import Layout

sys.path.insert(0, sys.argv[1])
import toy

kernel = compile.combine(toy.twice, ("value",), (), Layout(False, ("F32",), "F32"))
out = np.empty(3, np.float32)
kernel(0, (np.arange(3, dtype=np.float32),), out, (np.uint64(0),))
print(out.tolist(), generated.cache_folder())
"""


def test_two_processes_that_compile_the_same_kernel_at_once_both_work(tmp_path):
    (tmp_path / "toy.py").write_text("def twice(value):\n    return value[0] * 2.0\n")
    environment = {**os.environ, "MERGETOOL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error", "-c", COMPILE_AND_RUN, str(tmp_path)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        assert out.strip() == f"[0.0, 2.0, 4.0] {tmp_path / 'cache' / 'kernels'}"
    assert len(list((tmp_path / "cache" / "kernels").glob("*.py"))) == 1
    assert not list((tmp_path / "cache" / "kernels").glob("*.tmp"))


def words(value):
    """Every word of the language, with plain numbers among its arguments."""
    low = minimum(value[0], 0.5)
    high = maximum(value[0], sqrt(2.0))
    return where(value[0] > 0.0, 1.0, low) + sign(value[0]) * high + sqrt(abs(value[0])) + where(low < 0.0, 0.1, 0.3)


def test_every_word_of_the_language_means_the_same_in_every_binding():
    values = np.concatenate([np.random.default_rng(0).normal(size=1000), [0.0, 1.0, np.sqrt(2.0), 0.5, np.nan, np.inf]])
    results, bad = [], []
    for backend in (compile, NumpyArrays(), TorchArrays("cpu")):
        out = np.empty_like(values)
        kernel = backend.combine(words, ("value",), (), Layout(False, ("F64",), "F64"))
        bad.append(kernel(0, (values,), out, (np.uint64(0),)))
        results.append(out)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert bad == [2, 2, 2]
