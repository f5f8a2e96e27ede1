"""A coordinate text becomes a small module of straight lines, kept with its machine code under a name made from it."""

import errno
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from backends import BACKENDS

from mergetool.kernels import compile, objects
from mergetool.kernels.backend import FEW_THRESHOLDS, Layout
from mergetool.kernels.language import maximum, minimum, sign, sqrt, where
from mergetool.kernels.text import called, keyword_arguments, plain, positional_arguments
from mergetool.methods import METHODS
from mergetool.methods.bare import merge_tensors
from mergetool.methods.declare import REQUIRED
from mergetool.storage.dtypes import dtype

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


def write(function, output="F32", inputs=("F32", "F32"), *, tensors=("value",), arguments=(), values=()):
    """Make a kernel anew, though the process has made it before, and run it on nothing."""
    layout = Layout("base" in tensors, inputs, output)
    kernel = compile.combine.__wrapped__(function, tensors, arguments, layout)
    tiles = [np.empty(0, dtype(kind).storage) for kind in inputs]
    assert kernel(0, tiles, np.empty(0, dtype(output).storage), (0,) * len(inputs), *values) == 0


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A kernel cache of this test alone."""
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path))
    return tmp_path / "kernels"


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

text_ = text

def kernel(start, size, x0, x1, out, keys, pairs, words, numbers):
    p0 = (numbers[0],)  # weight
    p1 = numbers[1] != 0.0  # normalize
    bad = u32(0)
    for first in range(0, size, 65536):
        last = first + 65536 if first + 65536 < size else size
        for k in range(first, last):
            w0 = widen_BF16(x0[k])
            w1 = widen_F32(x1[k])
            base = w0
            delta = (w1 - w0,)
            result = narrow_BF16(text_(base, delta, p0, p1))
            out[k] = result
            bad = u32(bad + u32(strange_BF16(result) | strange_BF16(x0[k]) | strange_F32(x1[k])))
    return i64(bad)
'''


def test_a_kernel_is_a_module_one_can_read_beside_its_machine_code(cache):
    how = {"tensors": ("base", "delta"), "arguments": ("weight", "normalize"), "values": ((0.5,), True)}
    write(text, "BF16", ("BF16", "F32"), **how)
    (path,) = cache.glob("*.py")
    assert path.read_text() == GENERATED
    assert path.name.startswith("text_")
    assert path.with_suffix(".o").exists()


def test_another_text_or_layout_is_another_file_and_the_same_is_the_same(cache):
    def make(function, output="F32", sources=2):
        write(function, output, ("F32",) * sources)
        return {path.name for path in cache.glob("*.o")}

    first = make(pairs)
    assert make(pairs) == first
    assert len(make(pairs, "BF16")) == 2
    assert len(make(pairs, sources=3)) == 3
    changed = type(pairs)(plain_two.__code__, globals(), "pairs")
    assert len(make(changed)) == 4
    assert not list(cache.glob("*.tmp"))


def plain_two(value):
    return value[0] * 2.0


def test_a_kernel_made_with_other_versions_or_for_another_processor_is_not_used(cache, monkeypatch):
    write(pairs)
    monkeypatch.setattr(objects, "_made_with", lambda: "another")
    write(pairs)
    assert len(list(cache.glob("*.o"))) == 2


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" + b[1:]])
def test_machine_code_that_is_not_whole_is_made_again(cache, spoil):
    write(pairs)
    (path,) = cache.glob("*.o")
    spoilt = spoil(path.read_bytes())
    path.write_bytes(spoilt)
    write(pairs)
    assert path.read_bytes() != spoilt
    assert objects._read(path) is not None


def test_a_kernel_that_needs_numba_to_run_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(objects, "_object", lambda function: None)
    monkeypatch.setattr(objects, "_owners", [])
    out = np.empty(3, np.float32)
    kernel = compile.combine.__wrapped__(pairs, ("value",), (), Layout(False, ("F32",), "F32"))
    assert kernel(0, (np.arange(3, dtype=np.float32),), out, (0,)) == 0
    assert out.tolist() == [0.0, 1.0, 4.0]
    assert not list(cache.glob("*.o"))


@pytest.mark.parametrize(
    "tile",
    [np.zeros(3, np.float64), np.zeros(2, np.float32), np.zeros(6, np.float32)[::2]],
    ids=["dtype", "size", "gaps"],
)
def test_a_kernel_refuses_memory_that_is_not_what_it_reads(tile):
    kernel = compile.combine(pairs, ("value",), (), Layout(False, ("F32",), "F32"))
    with pytest.raises(ValueError, match="a kernel takes 3 elements of float32 in a row"):
        kernel(0, (tile,), np.empty(3, np.float32), (0,))


def powers(value, *, n, flag):
    return value[0] ** n if flag else value[0]


def test_parameters_keep_their_kinds():
    kernel = compile.combine(powers, ("value",), ("n", "flag"), Layout(False, ("F64",), "F64"))
    out = np.empty(1)
    for n, flag, expected in [(3, True, -8.0), (3.0, True, -8.0), (3, False, -2.0), (2, np.True_, 4.0)]:
        kernel(0, (np.array([-2.0]),), out, (0,), n, flag)
        assert out[0] == expected


@pytest.fixture
def unsaid():
    """Nothing was said of caches yet, and what is said here does not count elsewhere."""
    objects._said.cache_clear()
    yield
    objects._said.cache_clear()


def test_without_a_cache_that_can_be_written_kernels_work_and_it_is_said_once(tmp_path, monkeypatch, unsaid):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="machine code is not kept there: Not a directory") as said:
        [write(pairs, output) for output in ("F32", "BF16")]
    assert len(said) == 1


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_disk_that_fills_up_stops_no_kernel_and_leaves_nothing_behind(cache, monkeypatch, unsaid, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    true = objects.tempfile.NamedTemporaryFile

    def temporary(**how):
        file = true(**how)
        file.write = full
        return file

    if failing == "write":
        monkeypatch.setattr(objects.tempfile, "NamedTemporaryFile", temporary)
    else:
        monkeypatch.setattr(objects.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        write(pairs)
    assert not list(cache.iterdir())
    monkeypatch.undo()


def test_the_cache_is_the_environment_s_or_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MERGETOOL_CACHE")
    assert objects.cache_folder("kernels") == tmp_path / "xdg" / "mergetool" / "kernels"
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path / "own"))
    assert objects.cache_folder("kernels") == tmp_path / "own" / "kernels"


def test_threads_may_make_kernels_at_once(cache):
    """Workers do; each kernel is made once, and asking again gives the same."""
    layouts = [Layout(False, ("F64",) * sources, "F32") for sources in range(1, 5)]

    def make(layout):
        kernel = compile.combine(pairs, ("value",), (), layout)
        kernel(0, [np.empty(0)] * layout.sources, np.empty(0, np.float32), (0,) * layout.sources)
        return kernel

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, layouts * 4))
    assert len(set(made)) == len(layouts)
    assert made[: len(layouts)] * 4 == made
    assert len(list(cache.glob("*.o"))) == len(layouts)


COMPILE_AND_RUN = """
import sys
import numpy as np
from mergetool.kernels import compile, objects
from mergetool.kernels.backend import FEW_THRESHOLDS, Layout

sys.path.insert(0, sys.argv[1])
import toy

kernel = compile.combine(toy.twice, ("value",), (), Layout(False, ("F32",), "F32"))
out = np.empty(3, np.float32)
kernel(0, (np.arange(3, dtype=np.float32),), out, (np.uint64(0),))
print(out.tolist(), objects.cache_folder("kernels"), "numba" in sys.modules)
"""


def test_two_processes_that_compile_the_same_kernel_at_once_both_work(tmp_path):
    (tmp_path / "toy.py").write_text("def twice(value):\n    return value[0] * 2.0\n")
    environment = {**os.environ, "MERGETOOL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error", "-c", COMPILE_AND_RUN, str(tmp_path)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folder = tmp_path / "cache" / "kernels"
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        assert out.startswith(f"[0.0, 2.0, 4.0] {folder} ")
    assert len(list(folder.glob("*.o"))) == 1
    assert not list(folder.glob("*.tmp"))
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.strip() == f"[0.0, 2.0, 4.0] {folder} False"


def words(value):
    """Every word of the language, with plain numbers among its arguments."""
    low = minimum(value[0], 0.5)
    high = maximum(value[0], sqrt(2.0))
    return where(value[0] > 0.0, 1.0, low) + sign(value[0]) * high + sqrt(abs(value[0])) + where(low < 0.0, 0.1, 0.3)


def test_every_word_of_the_language_means_the_same_in_every_binding():
    values = np.concatenate([np.random.default_rng(0).normal(size=1000), [0.0, 1.0, np.sqrt(2.0), 0.5, np.nan, np.inf]])
    results, bad = [], []
    for backend in BACKENDS.values():
        out = np.empty_like(values)
        kernel = backend.combine(words, ("value",), (), Layout(False, ("F64",), "F64"))
        bad.append(kernel(0, (values,), out, (np.uint64(0),)))
        results.append(out)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)
    assert set(bad) == {2}


def with_numba(name):
    """The kernels of this name that Numba's own functions must stand by."""
    compiled = [each.native_name for each in objects._owners if hasattr(each, "native_name")]
    return [each for each in compiled if f"mergetool_kernel_{name}_" in each]


@pytest.mark.parametrize("kind", ["F64", "F32", "BF16", "F16", "F8_E4M3"])
def test_looking_at_magnitudes_needs_llvm_alone(kind):
    layout = Layout(True, (kind, kind))
    compile.between(layout), compile.above(layout), compile.above(layout, FEW_THRESHOLDS)
    assert not with_numba("between") + with_numba("above")


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.reach == "coordinate" and not m.facts])
def test_every_method_needs_llvm_alone(name):
    """A kernel that Numba's own functions must stand by would be compiled anew in every process."""
    method = METHODS[name]
    parameters = {n: p.default if p.default is not REQUIRED else 0.5 for n, p in method.parameters.items()}
    tensors = [np.ones(3, np.float32)] * min(2, method.most or 2)
    merge_tensors(name, tensors, base=np.zeros(3, np.float32) if method.base == "required" else None, **parameters)
    assert not with_numba(method.function.__name__)
