"""Laws that every method of the catalogue obeys; a new method is tested by being listed.

Parameters come from each method's declaration: the defaults with weights that sum to one, everything changed, every
choice, a negative weight. The exceptions are stated where they are made.
"""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mergetool.kernels.backend import BLOCK, Layout
from mergetool.methods.apply import looks, measure, portion
from mergetool.methods.bare import merge_tensors
from mergetool.methods.declare import Sums
from methods.cases import (
    BACKENDS,
    SOURCES,
    STORAGE,
    TORCH,
    Case,
    bits,
    every_variant,
    make,
    merge,
    plainest,
    sources_of,
    ulps,
    values_of,
)
from methods.cases import BARE as METHODS

SIZE = 5000
LARGE = 3 * BLOCK + 1234
"""Four tiles, the last of them short."""

EVERY = every_variant()


def of(applies):
    """Over each variant of the methods that a law applies to."""
    chosen = [(method, parameters) for method, parameters in EVERY if applies(method)]
    ids = [f"{method.name}-{i}" for i, (method, _) in enumerate(chosen)]
    return pytest.mark.parametrize(("method", "parameters"), chosen, ids=ids)


variants = of(lambda method: True)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
any_number = pytest.mark.parametrize("method", [m for m in METHODS.values() if m.most is None], ids=lambda m: m.name)

MIXED = ("BF16", "F32", "F16", "BF16")
LAYOUTS = {"F32": (("F32",), "F32"), "mixed": (MIXED, "BF16"), "F16": (("F16",), "F16")}
layouts = pytest.mark.parametrize(("dtypes", "output"), LAYOUTS.values(), ids=LAYOUTS)


def measures_sums(case):
    """Whether the case depends on sums over the tensor, which a binding may add up in an order of its own."""
    measures = case.method.measures.values()
    return any(isinstance(m, Sums) and m.needed(**case.bound.parameters) for m in measures)


def alike(case, values, dtype="F32"):
    """The same case with every tensor the same."""
    raw = [values.astype(np.float32) for _ in case.raw]
    return Case(case.method, case.parameters, raw, (dtype,) * len(raw))


@methods
def test_sources_that_are_all_the_same_give_that_source(method):
    """With weights that sum to one and the defaults otherwise, of which none drops or scales."""
    case = make(method, plainest(method, sources_of(method)), SIZE)
    source = values_of(method, SIZE, seed=8)[-1].astype(np.float32)
    same = alike(case, source)
    if method.base == "required" and method.most is None:  # else the base is one of two ends, and the same too
        same = Case(method, case.parameters, [case.raw[0], *same.raw[1:]], case.dtypes)
    out, _ = merge(same)
    np.testing.assert_array_equal(out, source)


@of(lambda method: method.base == "required")
def test_sources_that_are_all_the_base_give_the_base(method, parameters):
    """Whatever the parameters, randomness and rescaling included."""
    case = make(method, parameters, SIZE)
    out, bad = merge(alike(case, case.raw[0]))
    np.testing.assert_array_equal(out, case.raw[0])
    assert bad == 0


@of(lambda method: method.most != 1)
def test_the_order_of_sources_does_not_matter(method, parameters):
    """Each source keeps its label, so its random mask, and its own parameters. One ulp: sums are added in order."""
    case = make(method, parameters, SIZE)
    expected, _ = merge(case)
    for order in itertools.permutations(range(sources_of(method))):
        assert ulps(merge(case.permuted(order))[0], expected) <= 1


@methods
def test_the_numbers_of_a_random_method_depend_on_seed_label_and_tensor(method):
    """And those of any other method on none of them."""
    parameters = plainest(method, sources_of(method))
    if "density" in parameters:
        parameters["density"] = (0.5,) * sources_of(method)
    case = make(method, parameters, SIZE)
    expected, _ = merge(case)
    labels = tuple(f"other {i}" for i in range(sources_of(method)))
    changed = [{"seed": 6}, {"labels": labels}, {"name": "lm_head.weight"}]
    for change in changed:
        out, _ = merge(Case(**{**vars(case), **change}))
        assert np.array_equal(out, expected) is not method.random


@variants
@layouts
def test_inputs_are_not_touched(method, parameters, dtypes, output):
    case = make(method, parameters, SIZE, dtypes, output)
    before = [raw.copy() for raw in case.raw]
    for name in BACKENDS:
        merge(case, name)
        for raw, copy in zip(case.raw, before, strict=True):
            np.testing.assert_array_equal(bits(raw), bits(copy))


@variants
def test_the_result_does_not_depend_on_the_tiles(method, parameters):
    """Bit for bit, with tiles of one and two blocks, last tile first; sums of blocks are added exactly."""
    case = make(method, parameters, LARGE)
    expected, bad = merge(case)
    for tile in (BLOCK, 2 * BLOCK):
        out, again = merge(case, tile=tile)
        np.testing.assert_array_equal(bits(out), bits(expected))
        assert again == bad == 0


@variants
@layouts
def test_compiled_numpy_and_torch_give_the_same_bytes(method, parameters, dtypes, output):
    """All but float32 results that depend on sums over the tensor.

    Bindings add up a block in orders of their own, so such sums agree to 1e-12 and float32 results to one ulp.
    """
    case = make(method, parameters, SIZE, dtypes, output, seed=1)
    expected, bad = merge(case)
    for name in ("numpy", "torch"):
        out, other = merge(case, name)
        if measures_sums(case) and output == "F32":
            assert ulps(out, expected) <= 1
        else:
            np.testing.assert_array_equal(bits(out), bits(expected))
        assert other == bad == 0


@variants
def test_measures_agree_between_bindings_and_tiles(method, parameters):
    """Exactly for cuts, and for sums between tiles; to 1e-12 for sums between bindings."""
    case = make(method, parameters, LARGE)

    def found(backend, tile):
        def visit(do, share=1.0):
            return [
                (s, do(s, tuple(raw[s : s + portion(min(tile, LARGE - s), share)] for raw in case.raw)))
                for s in range(0, LARGE, tile)
            ]

        return measure(case.bound, case.layout, LARGE, visit, BACKENDS[backend])

    expected = found("compiled", LARGE)
    assert found("compiled", BLOCK) == expected
    for name in ("numpy", "torch"):
        measured = found(name, LARGE)
        assert found(name, 2 * BLOCK) == measured
        if measures_sums(case):
            np.testing.assert_allclose(measured, expected, rtol=1e-12)
        else:
            assert measured == expected


@variants
def test_a_method_that_need_not_look_is_not_shown_the_tensor(method, parameters):
    """And `looks` says beforehand whether it is."""
    case = make(method, parameters, SIZE)
    shown = []

    def visit(do, share=1.0):
        shown.append(True)
        return [(0, do(0, tuple(case.raw)))]

    measured = measure(case.bound, case.layout, SIZE, visit, BACKENDS["compiled"])
    assert looks(case.bound) is bool(shown)
    assert len(measured) == len(method.measures)
    facts = dict(zip(method.measures, measured, strict=True))
    assert not looks(case.bound, tuple(facts))
    assert measure(case.bound, case.layout, SIZE, lambda do: 1 / 0, BACKENDS["compiled"], facts) == measured


@methods
def test_coordinates_that_are_not_finite_are_counted_once(method):
    """Where an input is not finite, in however many inputs, and where only the result is not; in every binding."""
    plain = plainest(method, sources_of(method))
    case = make(method, plain, SIZE)
    case.raw[0][[3, 4]] = np.nan, np.inf
    case.raw[-1][[4, 7, 8]] = np.nan, -np.inf, np.inf
    expected = len({3, 4, 7, 8})
    assert {name: merge(case, name)[1] for name in BACKENDS} == dict.fromkeys(BACKENDS, expected)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_an_input_that_is_not_finite_is_counted_though_nothing_of_it_is_kept(value):
    """A model with a NaN is broken, whatever the method makes of it."""
    method = METHODS["dare_linear"]
    case = make(method, {**plainest(method, SOURCES), "density": (0.0,) * SOURCES}, SIZE)
    case.raw[2][7] = value
    for name in BACKENDS:
        out, bad = merge(case, name)
        np.testing.assert_array_equal(out, case.raw[0])
        assert bad == 1


@methods
def test_a_result_beyond_its_dtype_is_counted(method):
    """float32 inputs near 100 000 are finite and float16 ends at 65 504."""
    plain = plainest(method, sources_of(method))
    case = make(method, plain, SIZE, output="F16")
    for raw in case.raw:
        raw[10:15] = 100_000.0
    for name in BACKENDS:
        out, bad = merge(case, name)
        assert bad == 5
        assert set(out[10:15].tolist()) == {0x7C00}


@methods
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1, 1, 1), (2, 3)], ids=str)
def test_any_shape_is_kept_the_empty_ones_and_scalars_too(method, shape):
    count = sources_of(method)
    tensors = [np.full(shape, i + 1.0, np.float32) for i in range(count)]
    base = np.zeros(shape, np.float32) if method.base == "required" else None
    parameters = {**plainest(method, count)}
    if "density" in parameters:
        parameters["density"] = (0.5,) * count
    out = merge_tensors(method, tensors, base, parameters=parameters)
    assert (out.shape, out.dtype) == (shape, np.float32)
    assert np.isfinite(out).all()


@methods
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_shape_and_dtype_are_the_base_s_or_the_first_source_s(method, dtype):
    """Whatever the dtypes of the others; the layouts are those of the other tests."""
    kinds = itertools.cycle(MIXED if dtype == "BF16" else (dtype,))
    count = sources_of(method) + (method.base == "required")
    given = [torch.linspace(0, i + 1, 6).reshape(2, 3).to(TORCH[next(kinds)]) for i in range(count)]
    base, tensors = (given[0], given[1:]) if method.base == "required" else (None, given)
    out = merge_tensors(method, tensors, base, parameters=plainest(method, sources_of(method)))
    assert (out.shape, out.dtype) == ((2, 3), TORCH[dtype])


@any_number
def test_many_sources_are_merged_like_few(method):
    """A dozen."""
    case = make(method, plainest(method, 12), SIZE, sources=12)
    out, bad = merge(case)
    np.testing.assert_array_equal(bits(out), bits(merge(case, "numpy")[0]))
    assert bad == 0


@any_number
def test_a_single_source_with_weight_one_is_the_result(method):
    """And is enough, for every method so far."""
    assert method.fewest == 1
    case = make(method, plainest(method, 1), SIZE, sources=1)
    np.testing.assert_array_equal(merge(case, "numpy")[0], case.raw[-1])


def digests():
    """The digest of every method's result on two tiles, by name and variant."""
    found = []
    for i, (method, parameters) in enumerate(EVERY):
        out, _ = merge(make(method, parameters, BLOCK + 100), tile=BLOCK)
        found.append(f"{method.name} {i} {hashlib.sha256(out.tobytes()).hexdigest()}")
    return found


def test_every_process_gives_the_same_bytes():
    """Whatever PYTHONHASHSEED is."""
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        "from methods import test_laws; print(*test_laws.digests(), sep='\\n')",
    ]
    running = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    expected = digests()
    for process in running:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, "")
        assert out.splitlines() == expected


def test_float8_and_float64_are_read():
    """Sources in float8 and float64 beside a float32 base, the same in every binding."""
    random = np.random.default_rng(2)
    codes = random.integers(0, 0x78, 500).astype(np.uint8)
    raw = [random.normal(size=500).astype(np.float32), codes, codes[::-1].copy(), random.normal(size=500)]
    method = METHODS["ties"]
    parameters = {**plainest(method, 3), "density": (0.5, 0.5, 0.5)}
    case = Case(method, parameters, raw, ("F32", "F8_E4M3", "F8_E5M2", "F64"), "F64")
    results = [merge(case, name) for name in BACKENDS]
    for out, bad in results:
        np.testing.assert_array_equal(out, results[0][0])
        assert bad == 0


def test_a_cut_is_that_of_the_model_when_it_is_given():
    """TIES by `scope: model` gets its cuts as facts; the tensor is then only combined."""
    method = METHODS["ties"]
    parameters = {**plainest(method, 3), "density": (0.1, 0.5, 0.9), "scope": "model"}
    case = make(method, parameters, SIZE)
    cuts = (1e-3, 2e-3, np.inf)
    measured = measure(case.bound, case.layout, SIZE, lambda do: 1 / 0, BACKENDS["numpy"], {"cut": cuts})
    assert measured == (cuts,)


def test_sums_that_leave_float64_are_not_finite_and_do_not_stop_the_run():
    """Two tiles whose sums are finite and their total is not; SLERP falls back to the straight line."""
    method = METHODS["slerp"]
    ends = [np.full(2 * BLOCK, 1.0), np.full(2 * BLOCK, 1.0)]
    for value in (4e151, 1e200, np.inf):
        raw = [ends[0] * value, ends[1]]
        case = Case(method, {"t": 0.5}, raw, ("F64", "F64"), "F64")
        for name in ("compiled", "numpy"):
            measured = measure(
                case.bound,
                Layout(True, ("F64", "F64")),
                2 * BLOCK,
                lambda do, raw=raw: [(s, do(s, tuple(r[s : s + BLOCK] for r in raw))) for s in (0, BLOCK)],
                BACKENDS[name],
            )
            assert len(measured[0]) == 2


def test_cases_cover_every_choice_of_every_parameter():
    """The tests' own machinery: what is chosen from the declarations is valid and reaches every choice."""
    for method in METHODS.values():
        made = [values for m, values in EVERY if m is method]
        for name, parameter in method.parameters.items():
            for values in made:
                given = values[name] if parameter.per_source else (values[name],)
                assert [parameter.check(v) for v in given] == list(given)
            if parameter.choices:
                assert {repr(values[name]) for values in made} == {repr(c) for c in parameter.choices}
            else:
                assert len({repr(values[name]) for values in made}) > 1 or parameter.required
    assert set(STORAGE) == set(TORCH)
