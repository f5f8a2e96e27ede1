"""CKA is one for the same features in any orthogonal basis, and about nothing for unrelated ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergetool.facts import cka


def normal(n, channels, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, channels)).astype(np.float32))


def by_batches(x, y, size=64):
    state = cka.empty_hsic()
    for a, b in zip(x.split(size), y.split(size), strict=True):
        cka.accumulate_hsic(state, a, b)
    return float(cka.finish_hsic(state)["cka"])


def naive_hsic(k, l):  # noqa: E741
    """Song et al. 2012, equation 5, in loops' plainest matrices."""
    m = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(m)
    middle = (one @ k @ one) * (one @ l @ one) / ((m - 1) * (m - 2))
    return (np.trace(k @ l) + middle - 2 / (m - 2) * (one @ k @ l @ one)) / (m * (m - 3))


def test_the_unbiased_estimator_is_the_papers():
    x, y = normal(20, 5, 0).double(), normal(20, 7, 1).double()
    state = cka.empty_hsic()
    cka.accumulate_hsic(state, x, y)
    k, l = ((z := (each - each.mean(0)).numpy()) @ z.T for each in (x, y))  # noqa: E741
    found = [float(state[key]) for key in ("xy", "xx", "yy")]
    assert found == pytest.approx([naive_hsic(k, l), naive_hsic(k, k), naive_hsic(l, l)])


def test_one_batch_is_the_quotient_of_hsics():
    x, y = normal(30, 5, 0) + 2, normal(30, 7, 1)
    k, l = ((z := each.double().numpy()) @ z.T for each in (x, y))  # noqa: E741
    expected = naive_hsic(k, l) / np.sqrt(naive_hsic(k, k) * naive_hsic(l, l))
    assert by_batches(x, y, 30) == pytest.approx(expected, rel=1e-9)


def test_a_rotation_a_scale_and_a_shift_change_nothing():
    x = normal(640, 12, 0)
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]).float()
    assert by_batches(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-5)


def test_unrelated_features_have_none():
    values = [by_batches(normal(640, 12, i), normal(640, 12, 100 + i)) for i in range(8)]
    assert abs(np.mean(values)) < 0.02


def test_constant_features_have_none():
    assert by_batches(torch.full((640, 3), 0.1), normal(640, 3, 0)) == 0


def test_a_batch_too_small_for_the_estimator_is_left_out():
    state = cka.empty_hsic()
    cka.accumulate_hsic(state, normal(3, 2, 0), normal(3, 2, 1))
    assert float(state["count"]) == 0
