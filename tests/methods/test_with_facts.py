"""Methods that know more than tensors: each against its paper's formula, whatever runs it and however it is cut."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from backends import BACKENDS

from mergetool.errors import RecipeError
from mergetool.execute.known import Extra
from mergetool.kernels import compile
from mergetool.kernels.backend import Layout
from mergetool.kernels.rounding import narrow, widen
from mergetool.methods import METHODS
from mergetool.methods.apply import bind, combiner
from mergetool.methods.bare import merge_tensors

COORDINATE = ("dam", "fisher", "greedy_soup")
MATRIX = ("regmean",)
SHAPE = (37, 101)


def test_every_method_with_facts_is_tested_here():
    assert {name for name, method in METHODS.items() if method.facts} == {*COORDINATE, *MATRIX}
    assert {name for name, method in METHODS.items() if method.reach == "matrix"} == set(MATRIX)


@pytest.mark.parametrize("name", [*COORDINATE, *MATRIX])
def test_tensors_alone_are_refused(name):
    with pytest.raises(RecipeError, match="measured"):
        merge_tensors(name, [np.zeros(2), np.ones(2)], np.zeros(2))


def parameters(name, **changed):
    method = METHODS[name]
    plain = {p.name: (p.default,) * 3 if p.per_source else p.default for p in method.parameters.values()}
    return {**plain, **changed}


def models(dtype, count=3):
    random = np.random.default_rng(3)
    base = random.normal(scale=0.02, size=SHAPE)
    values = [base, *(base + random.normal(scale=1e-3, size=SHAPE) for _ in range(count))]
    raw = [narrow(value, dtype) for value in values]
    return raw, [widen(each, dtype).reshape(SHAPE) for each in raw]


EXTRAS = {
    "one number": lambda random: Extra(random.random(()), ()),
    "columns": lambda random: Extra(random.random(SHAPE[1:]), (1,)),
    "rows": lambda random: Extra(random.random(SHAPE[:1]), (0,)),
    "weights": lambda random: Extra(random.random(SHAPE), (0, 1)),
    "rows and columns": lambda random: Extra(
        random.random(SHAPE[1:], np.float32), (1,), Extra(random.random(SHAPE[:1], np.float32) / 8, (0,))
    ),
}


def combined(name, backend, dtype, extras, tile=10**9, **changed):
    """A method's kernel over the tiles of a tensor."""
    method = METHODS[name]
    raw, _ = models(dtype)
    raw = [each.reshape(-1) for each in (raw if method.base == "required" else raw[1:])]
    layout = Layout(method.base == "required", (dtype,) * len(raw), dtype, tuple(method.facts))
    kernel = combiner(bind(method, parameters(name, **changed), 0, ["a", "b", "c"], "w"), layout, (), backend)
    out = np.empty_like(raw[0])
    for start in range(0, out.size, tile):
        stop = min(start + tile, out.size)
        inputs = (*(each[start:stop] for each in raw), *(extra.tile(SHAPE, start, stop) for extra in extras))
        assert kernel(start, inputs, out[start:stop]) == 0
    return out.reshape(SHAPE)


def extras_of(kind):
    random = np.random.default_rng(11)
    return [EXTRAS[kind](random) for _ in range(3)]


def spread(extra):
    """An extra's numbers over the whole tensor, as the kernels get them: float32."""
    values = np.asarray(extra.values, np.float32).astype(np.float64)
    own = np.broadcast_to(np.expand_dims(values, [axis for axis in range(2) if axis not in extra.axes]), SHAPE)
    return own if extra.added is None else (own + spread(extra.added)).astype(np.float32).astype(np.float64)


def oracle(name, dtype, extras, **changed):
    """The papers' formulas, written out."""
    _, (base, *values) = models(dtype)
    factors = [spread(extra) for extra in extras]
    if name == "dam":
        if changed.get("whole"):
            return sum(c * v for c, v in zip(factors, values, strict=True))
        return base + sum(c * (v - base) for c, v in zip(factors, values, strict=True))
    if name == "greedy_soup":
        return sum(s * v for s, v in zip(factors, values, strict=True)) / sum(factors)
    weight, floor = changed.get("weight", (1.0,) * 3), changed.get("floor", 1e-6)
    shares = [w * np.maximum(f, floor) for w, f in zip(weight, factors, strict=True)]
    return sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)


CASES = [
    ("dam", {}),
    ("dam", {"whole": True}),
    ("greedy_soup", {}),
    ("fisher", {}),
    ("fisher", {"weight": (0.5, 2.0, 1.0), "floor": 0.3}),
]


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize(("name", "changed"), CASES)
def test_the_papers_formula(name, changed, kind):
    extras = extras_of(kind)
    for dtype, tolerance in (("F64", 1e-15), ("F32", 1e-8), ("BF16", 5e-4)):
        found = widen(combined(name, compile, dtype, extras, **changed).reshape(-1), dtype).reshape(SHAPE)
        np.testing.assert_allclose(found, oracle(name, dtype, extras, **changed), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", COORDINATE)
def test_bfloat16_is_the_oracle_rounded_once(name):
    extras = extras_of("columns")
    found = combined(name, compile, "BF16", extras)
    np.testing.assert_array_equal(found, narrow(oracle(name, "BF16", extras), "BF16"))


@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COORDINATE)
def test_bindings_and_tiles_give_the_same_bytes(name, backend, kind):
    extras = extras_of(kind)
    whole = combined(name, compile, "BF16", extras)
    for tile in (64, 101, 1000):
        np.testing.assert_array_equal(combined(name, BACKENDS[backend], "BF16", extras, tile), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soup_is_the_mean_of_its_members_and_one_model_alone_is_itself(backend):
    for shares in ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0)):
        raw, values = models("BF16")
        members = [i for i, share in enumerate(shares) if share]
        found = combined("greedy_soup", BACKENDS[backend], "BF16", [Extra(np.array(s), ()) for s in shares])
        np.testing.assert_array_equal(found, narrow(sum(values[1 + i] for i in members) / len(members), "BF16"))
    np.testing.assert_array_equal(found, raw[2])


@pytest.mark.parametrize("shape", [(5, 7, 11), (5, 1, 1, 77), (35, 11, 1), (1, 1, 5, 77)])
def test_numbers_along_any_axes_are_cut_as_the_tensor_is(shape):
    random = np.random.default_rng(2)
    for axes in (axes for n in range(len(shape) + 1) for axes in combinations(range(len(shape)), n)):
        extra = Extra(random.random([shape[axis] for axis in axes]), axes)
        apart = [axis for axis in range(len(shape)) if axis not in axes]
        whole = np.broadcast_to(np.expand_dims(extra.values, apart), shape).astype(np.float32).reshape(-1)
        for start, stop in ((0, 385), (3, 100), (76, 79), (77, 154), (384, 385)):
            found = extra.tile(shape, start, stop)
            assert found.flags.c_contiguous
            assert found.flags.writeable
            np.testing.assert_array_equal(found, whole[start:stop])


def test_stacked_experts_have_coefficients_for_each_expert_and_row_and_column():
    shape, random = (5, 7, 11), np.random.default_rng(2)
    columns, rows = random.random((5, 11), np.float32), random.random((5, 7), np.float32)
    whole = (columns[:, None, :] + rows[:, :, None]).reshape(-1)
    extra = Extra(columns, (0, 2), Extra(rows, (0, 1)))
    for start, stop in ((0, 385), (3, 100), (76, 79), (384, 385)):
        np.testing.assert_array_equal(extra.tile(shape, start, stop), whole[start:stop])


def regmean_naively(values, grams, weight, off_diagonal, ridge):
    """Equation 2 of arXiv:2212.09849 and its off-diagonal shrinkage, row by row of the matrix."""
    shrunk = [g * off_diagonal + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    inner = sum(w * g for w, g in zip(weight, shrunk, strict=True))
    least = ridge * np.trace(inner) / len(inner)
    mean = sum(w * v for w, v in zip(weight, values, strict=True)) / sum(weight)
    rows = []
    for row in range(len(mean)):
        right = sum(w * g @ v[row] for w, g, v in zip(weight, shrunk, values, strict=True)) + least * mean[row]
        rows.append(np.linalg.lstsq(inner + least * np.eye(len(inner)), right, rcond=None)[0])
    return np.array(rows)


def solved(values, grams, **options):
    """RegMean of NumPy's matrices."""
    values, grams = ([torch.from_numpy(each) for each in every] for every in (values, grams))
    return METHODS["regmean"](values, grams, **options).numpy()


def seen(random, tokens, inputs):
    x = random.normal(size=(tokens, inputs)) @ random.normal(size=(inputs, inputs))
    return x.T @ x / tokens


@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize(("off_diagonal", "ridge"), [(0.9, 1e-6), (1.0, 1e-3), (0.0, 1e-6)])
def test_regmean_is_the_papers_formula(tokens, off_diagonal, ridge):
    random = np.random.default_rng(5)
    values = [random.normal(size=(6, 12)) for _ in range(3)]
    grams = [seen(random, tokens, 12) for _ in values]
    weight = (1.0, 0.5, 2.0)
    found = solved(values, grams, weight=weight, off_diagonal=off_diagonal, ridge=ridge)
    expected = regmean_naively(values, grams, weight, off_diagonal, ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_regmean_keeps_what_each_source_does_where_their_inputs_do_not_meet():
    random = np.random.default_rng(6)
    values = [random.normal(size=(4, 10)) for _ in range(2)]
    first, second = np.diag([1.0] * 5 + [0.0] * 5), np.diag([0.0] * 5 + [1.0] * 5)
    found = solved(values, [first, second], weight=(1.0, 1.0), off_diagonal=1.0, ridge=1e-9)
    np.testing.assert_allclose(found, np.hstack([values[0][:, :5], values[1][:, 5:]]), atol=1e-7)


def test_regmean_of_inputs_that_nobody_saw_is_the_mean():
    random = np.random.default_rng(7)
    values = [random.normal(size=(4, 3)) for _ in range(2)]
    found = solved(values, [np.zeros((3, 3))] * 2, weight=(1.0, 3.0), off_diagonal=0.9, ridge=1e-6)
    np.testing.assert_allclose(found, 0.25 * values[0] + 0.75 * values[1])


def test_regmean_solves_stacked_experts_one_by_one():
    random = np.random.default_rng(8)
    values = [random.normal(size=(3, 4, 5)) for _ in range(2)]
    grams = [np.stack([seen(random, 50, 5) for _ in range(3)]) for _ in values]
    options = {"weight": (1.0, 1.0), "off_diagonal": 0.9, "ridge": 1e-6}
    found = solved(values, grams, **options)
    for e in range(3):
        one = solved([v[e] for v in values], [g[e] for g in grams], **options)
        np.testing.assert_allclose(found[e], one, rtol=1e-12)
