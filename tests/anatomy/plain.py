"""Plain networks of torch: matrices in a line, and convolutions with batch norms."""

from __future__ import annotations

import numpy as np

from mergetool.anatomy import anatomy, symmetries


def mlp():
    """Three matrices, two hidden widths, by the numbers of a sequence."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 5)
    )
    return _shaken(nn.ModuleDict({"net": network})["net"], "net.")


def conv():
    """Two convolutions with batch norms, then two matrices, by names."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
            self.conv2, self.bn2 = nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
            self.fc1, self.fc2 = nn.Linear(10 * 4, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = nn.functional.max_pool2d(torch.tanh(self.bn1(self.conv1(x))), 2)
            x = nn.functional.max_pool2d(torch.tanh(self.bn2(self.conv2(x))), 2)
            return self.fc2(torch.tanh(self.fc1(x.flatten(1))))

    torch.manual_seed(0)
    return _shaken(Net(), "")


def _shaken(network, prefix):
    """The network with random numbers wherever it has ones and zeros; its tensors; a way to run any."""
    import torch

    network.eval()
    with torch.no_grad():
        for name, values in network.state_dict().items():
            if name.endswith("running_var"):
                values.mul_(1 + torch.rand(values.shape))
            elif values.ndim == 1:
                values.add_(torch.randn(values.shape) * 0.1)
    tensors = {prefix + name: values.numpy().copy() for name, values in network.state_dict().items()}
    return Plain(network, prefix, tensors)


class Plain:
    def __init__(self, network, prefix, tensors):
        self.network, self.prefix, self.tensors = network, prefix, tensors

    def groups(self):
        shapes = {name: values.shape for name, values in self.tensors.items()}
        return symmetries(anatomy({}, shapes), {}, shapes)

    def load(self, tensors):
        import torch

        state = {name.removeprefix(self.prefix): torch.tensor(np.ascontiguousarray(v)) for name, v in tensors.items()}
        self.network.load_state_dict(state)
        return self.network

    def inputs(self, count=16, seed=0):
        import torch

        shape = (6,) if self.prefix else (3, 8, 8)
        return torch.tensor(np.random.default_rng(seed).normal(size=(count, *shape)), dtype=torch.float32)

    def outputs(self, tensors):
        import torch

        with torch.no_grad():
            return self.load(tensors)(self.inputs()).numpy()
