"""REPAIR by moments and factors, layer after layer, equals REPAIR by batch norms put into the network and folded."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from mergetool.facts.correction import Moments, factors, fold, goal


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)).double()


def conv_net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).double()


def data(net):
    shape = (64, 12) if isinstance(net[0], nn.Linear) else (32, 2, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def average(first, second, share):
    merged = copy.deepcopy(first)
    with torch.no_grad():
        for out, a, b in zip(merged.parameters(), first.parameters(), second.parameters(), strict=True):
            out.copy_((1 - share) * a + share * b)
    return merged


def layers(net):
    return [at for at, module in enumerate(net) if isinstance(module, nn.Linear | nn.Conv2d)]


@torch.no_grad()
def moments(net, at, x):
    """Of the outputs of layer ``at``, everything but the channels pooled."""
    z = net[: at + 1](x)
    values = z.movedim(1, -1).reshape(-1, z.shape[1]).numpy()
    return Moments(values.mean(0), values.std(0), len(values))


@torch.no_grad()
def by_factors(first, second, share, x, **options):
    """Measure, correct, fold; then the next layer."""
    merged = average(first, second, share)
    for at in layers(merged):
        target = goal([moments(first, at, x), moments(second, at, x)], [1 - share, share])
        found = factors(target, moments(merged, at, x), **options)
        bias = None if merged[at].bias is None else merged[at].bias.numpy()
        weight, bias = fold(merged[at].weight.numpy(), bias, found)
        merged[at].weight.copy_(torch.from_numpy(weight))
        merged[at].bias = nn.Parameter(torch.from_numpy(bias))
    return merged


@torch.no_grad()
def by_batch_norm(first, second, share, x):
    """As published: a batch norm behind every layer, with the goal as its affine map; one pass; fold."""
    merged = average(first, second, share)
    wrapped, counts = [], {}
    for at, module in enumerate(merged):
        wrapped.append(module)
        if at in layers(merged):
            kind = nn.BatchNorm1d if isinstance(module, nn.Linear) else nn.BatchNorm2d
            norm = kind(module.weight.shape[0], eps=1e-12, momentum=None, dtype=torch.float64)
            one, other = moments(first, at, x), moments(second, at, x)
            norm.weight.copy_(torch.from_numpy((1 - share) * one.std + share * other.std))
            norm.bias.copy_(torch.from_numpy((1 - share) * one.mean + share * other.mean))
            wrapped.append(norm)
            counts[norm] = one.count
    nn.Sequential(*wrapped).train()(x)
    for module, norm in pairwise(wrapped):
        if norm not in counts:
            continue
        biased = norm.running_var * (counts[norm] - 1) / counts[norm]  # which is what it normalised by
        gamma = norm.weight / torch.sqrt(biased)
        bias = torch.zeros_like(gamma) if module.bias is None else module.bias
        module.bias = nn.Parameter(norm.bias + gamma * (bias - norm.running_mean))
        module.weight.mul_(gamma.view(-1, *[1] * (module.weight.dim() - 1)))
    return merged


@pytest.mark.parametrize("build", [mlp, conv_net])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_repair_equals_re_estimated_batch_norms(build, share):
    first, second = build(0), build(1)
    x = data(first)

    ours = by_factors(first, second, share, x, clamp=1e9)
    theirs = by_batch_norm(first, second, share, x)

    for (name, found), (_, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-6, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(ours(x).detach(), theirs(x).detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("build", [mlp, conv_net])
def test_the_repaired_network_has_the_moments_it_should_have_in_every_layer(build):
    first, second = build(0), build(1)
    x = data(first)
    repaired = by_factors(first, second, 0.5, x)
    for at in layers(repaired):
        target, found = goal([moments(first, at, x), moments(second, at, x)]), moments(repaired, at, x)
        np.testing.assert_allclose(found.mean, target.mean, atol=1e-9)
        np.testing.assert_allclose(found.std, target.std, rtol=1e-9)


def test_measuring_all_layers_before_any_is_corrected_is_something_else():
    """Why the layers are taken one after the other."""
    first, second = mlp(0), mlp(1)
    x = data(first)
    merged = average(first, second, 0.5)
    at_once = copy.deepcopy(merged)
    with torch.no_grad():
        for at in layers(merged):
            target = goal([moments(first, at, x), moments(second, at, x)])
            weight, bias = fold(
                merged[at].weight.numpy(), merged[at].bias.numpy(), factors(target, moments(merged, at, x))
            )
            at_once[at].weight.copy_(torch.from_numpy(weight))
            at_once[at].bias.copy_(torch.from_numpy(bias))
    last = layers(merged)[-1]
    target = goal([moments(first, last, x), moments(second, last, x)])
    assert not np.allclose(moments(at_once, last, x).std, target.std, rtol=0.05)


def test_a_network_averaged_with_itself_is_left_alone():
    net = mlp(0)
    repaired = by_factors(net, net, 0.5, data(net))
    for found, expected in zip(repaired.parameters(), net.parameters(), strict=True):
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-12, atol=1e-13)


def test_units_that_are_dead_in_the_merged_network_do_not_disturb_the_others():
    first, second = mlp(0), mlp(1)
    with torch.no_grad():
        second[0].weight[3] = -first[0].weight[3]
    x = data(first)
    repaired = by_factors(first, second, 0.5, x)
    assert all(torch.isfinite(each).all() for each in repaired.parameters())
    found, target = moments(repaired, 0, x), goal([moments(first, 0, x), moments(second, 0, x)])
    np.testing.assert_allclose(found.mean, target.mean, atol=1e-9)
    assert found.std[3] < 1e-12
    np.testing.assert_allclose(np.delete(found.std, 3), np.delete(target.std, 3), rtol=1e-9)
