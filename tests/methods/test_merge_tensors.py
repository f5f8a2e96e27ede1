"""`merge_tensors` merges bare tensors of NumPy and torch, and says at once everything that is wrong."""

import doctest

import numpy as np
import pytest
import torch

import mergetool
from mergetool.errors import CheckpointError, RecipeError, ShapeMismatch
from mergetool.methods import METHODS, bare
from mergetool.methods.bare import merge_tensors

ONE, TWO = np.ones((2, 2), np.float32), np.full((2, 2), 2.0, np.float32)


def test_the_example_of_its_docstring():
    found = doctest.DocTestFinder().find(merge_tensors, globs=vars(bare).copy())
    runner = doctest.DocTestRunner()
    for example in found:
        runner.run(example)
    assert runner.summarize(verbose=False).attempted >= 2
    assert runner.failures == 0


def test_it_is_the_package_s():
    assert mergetool.merge_tensors is merge_tensors


def test_a_method_is_given_by_name_or_itself():
    by_name = merge_tensors("linear", [ONE, TWO], weight=1.0)
    np.testing.assert_array_equal(by_name, merge_tensors(METHODS["linear"], [ONE, TWO], weight=1.0))


def test_one_value_is_for_every_source_or_each_has_its_own():
    np.testing.assert_array_equal(merge_tensors("linear", [ONE, TWO], weight=[1, "3e0"]), np.full((2, 2), 1.75))
    np.testing.assert_array_equal(merge_tensors("linear", [ONE, TWO], weight=2), np.full((2, 2), 1.5))


@pytest.mark.parametrize("weight", [np.array([1, 3]), np.array([1.0, 3.0], np.float32), [np.int64(1), np.float64(3)]])
def test_parameters_may_be_numpys(weight):
    np.testing.assert_array_equal(merge_tensors("linear", [ONE, TWO], weight=weight), np.full((2, 2), 1.75))
    np.testing.assert_array_equal(
        merge_tensors("linear", [ONE, TWO], weight=np.float32(2), normalize=np.bool_(False)), np.full((2, 2), 6.0)
    )


@pytest.mark.parametrize("given", [{"lambda_": 0.5}, {"parameters": {"lambda": 0.5}}], ids=str)
def test_lambda_is_written_with_an_underscore_or_as_in_recipes(given):
    merged = merge_tensors("task_arithmetic", [TWO], ONE, weight=1.0, **given)
    np.testing.assert_array_equal(merged, np.full((2, 2), 1.5))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_tensors_give_a_torch_tensor(kind):
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(kind), torch.tensor([[3.0, 2.0], [1.0, 0.0]]).to(kind)]
    merged = merge_tensors("linear", tensors, weight=1.0)
    assert merged.dtype == kind
    assert torch.equal(merged, torch.full((2, 2), 2.0, dtype=kind))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_numpy_arrays_give_a_numpy_array(kind):
    merged = merge_tensors("linear", [np.ones(3, kind), np.full(3, 2.0, kind)], weight=1.0)
    assert isinstance(merged, np.ndarray)
    assert merged.dtype == kind
    np.testing.assert_array_equal(merged, np.full(3, 1.5))


def test_the_result_has_the_dtype_of_the_base():
    merged = merge_tensors("task_arithmetic", [TWO], ONE.astype(np.float16), weight=1.0)
    assert merged.dtype == np.float16


def test_tensors_may_be_strided_read_only_and_track_gradients():
    array = np.arange(12.0, dtype=np.float32).reshape(3, 4)[:, ::2]
    array.flags.writeable = False
    np.testing.assert_array_equal(merge_tensors("passthrough", [array]), array)
    tensor = torch.arange(12.0).reshape(3, 4).T.requires_grad_()
    merged = merge_tensors("passthrough", [tensor])
    assert torch.equal(merged, tensor.detach())
    assert not merged.requires_grad


def test_the_result_shares_no_memory_with_the_inputs():
    for tensor in (ONE.copy(), torch.ones(2, 2)):
        merged = merge_tensors("passthrough", [tensor])
        merged[0, 0] = 7.0
        assert tensor[0, 0] == 1.0


def test_float8_is_read_beside_a_wider_first_tensor():
    half = torch.tensor([0.5, 1.5])
    merged = merge_tensors("linear", [half, half.to(torch.float8_e4m3fn), half.to(torch.float8_e5m2)], weight=1.0)
    assert torch.equal(merged, half)


def test_a_result_in_float8_is_refused():
    with pytest.raises(CheckpointError, match="the result would be F8_E4M3"):
        merge_tensors("passthrough", [torch.ones(2).to(torch.float8_e4m3fn)])


def test_random_numbers_follow_seed_name_and_sources():
    def dare(**more):
        tensor = np.ones(1000, np.float32)
        return merge_tensors("dare_linear", [tensor], np.zeros_like(tensor), weight=1.0, density=0.5, **more)

    first = dare()
    np.testing.assert_array_equal(dare(), first)
    np.testing.assert_array_equal(dare(sources=["0"], name="tensor", seed=0), first)
    for other in (dare(seed=1), dare(name="other"), dare(sources=["a"])):
        assert not np.array_equal(other, first)


WRONG = {
    "unknown method": (("liner", [ONE]), {}, "there is no method `liner`"),
    "unknown parameter": (("linear", [ONE]), {"weight": 1.0, "density": 0.5}, "has no parameter `density`"),
    "missing parameter": (("linear", [ONE]), {}, "needs the parameter `weight`"),
    "missing base": (("ties", [ONE]), {"weight": 1.0}, "give `base`"),
    "no source": (("linear", []), {"weight": 1.0}, "sources, not 0"),
    "too many sources": (("passthrough", [ONE, TWO]), {}, "takes 1 to 1 sources, not 2"),
    "too few values": (("linear", [ONE, TWO]), {"weight": [1.0]}, "has 1 values for 2 sources"),
    "too large": (("ties", [ONE], TWO), {"weight": 1.0, "density": 1.5}, "`density` must be from 0 to 1, not 1.5"),
    "one too large": (("ties", [ONE, ONE], TWO), {"weight": 1.0, "density": [1, -0.1]}, "from 0 to 1, not -0.1"),
    "no number": (("linear", [ONE]), {"weight": "heavy"}, "`weight` must be a number, not 'heavy'"),
    "not finite": (("linear", [ONE]), {"weight": float("nan")}, "must be a finite number, not nan"),
    "no choice": (
        ("dare_linear", [ONE], TWO),
        {"weight": 1.0, "rescale": "l2"},
        "one of true, false, l1, not 'l2'",
    ),
    "too few names": (("linear", [ONE, TWO]), {"weight": 1.0, "sources": ["a"]}, "has 1 names for 2 tensors"),
    "a list": (("linear", [[1.0], ONE]), {"weight": 1.0}, "source 0: is a list, not a tensor"),
    "a base that is a list": (("ties", [ONE], [1.0]), {"weight": 1.0}, "base: is a list, not a tensor"),
    "a single tensor": (("linear", ONE), {"weight": 1.0}, "`tensors` is a single tensor"),
    "a model's scope": (("ties", [ONE], TWO), {"weight": 1.0, "scope": "model"}, "about all tensors of a model"),
    "a matrix": (("linear", [ONE, TWO]), {"weight": TWO}, "must be a number, not [2.0, 2.0]"),
    "weights that cancel": (("linear", [ONE, TWO]), {"weight": [1.0, -1.0]}, "sum to zero"),
}


@pytest.mark.parametrize(("given", "parameters", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(given, parameters, message):
    with pytest.raises(RecipeError) as caught:
        merge_tensors(*given, **parameters)
    assert message in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        merge_tensors("ties", [ONE, TWO], density=3.0, normalize="yes", lambada=1.0)
    assert len(caught.value.problems) == 5


def test_shapes_that_differ_are_refused():
    with pytest.raises(ShapeMismatch, match=r"layer\.weight: the tensors' shapes differ: \[\(2, 2\), \(3,\)\]"):
        merge_tensors("linear", [ONE, np.ones(3, np.float32)], weight=1.0, name="layer.weight")


@pytest.mark.parametrize("tensor", [np.ones(2, np.int64), torch.ones(2, dtype=torch.int32), np.ones(2, bool)], ids=str)
def test_tensors_that_are_no_floats_are_refused(tensor):
    with pytest.raises(CheckpointError, match="cannot be merged"):
        merge_tensors("passthrough", [tensor])
