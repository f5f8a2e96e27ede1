"""Networks of an adapter: batch norms get the statistics that training would give them, and layers their order."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from execute.correct_models import facts, kept  # noqa: E402
from mergetool.execute.fact_folder import open_facts  # noqa: E402
from mergetool.execute.run import run  # noqa: E402
from mergetool.facts.correction import Moments, goal  # noqa: E402
from mergetool.plan import build  # noqa: E402
from mergetool.recipe import load  # noqa: E402

__all__ = ["facts"]  # a fixture

ADAPTER = """
import numpy as np
import torch
from torch import nn


def network(config):
    if config["kind"] == "convolutions":
        return Convolutions()
    layers = [(f"layer{i}", nn.Linear(6, 6)) for i in range(11)]
    return Line(layers)


class Line(nn.Module):
    def __init__(self, layers):
        super().__init__()
        for name, layer in layers:
            self.add_module(name, layer)
        self.head = nn.Linear(6, 3)

    def forward(self, input):
        for name, layer in self.named_children():
            if name != "head":
                input = torch.tanh(layer(input))
        return self.head(input)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.hidden, self.classifier = nn.Linear(80, 7), nn.Linear(7, 3)

    def forward(self, input):
        x = input.reshape(-1, 1, 8, 8)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.classifier(torch.relu(self.hidden(x.flatten(1))))


def read(path, samples, seed):
    return [{"input": torch.from_numpy(np.load(path)[:samples]).float()}]
"""
RECIPE = """\
merge_method: linear
models: [{model: a, data: one}, {model: b, data: two}]
parameters: {weight: 0.5}
dtype: float32
calibration:
  adapter: adapter.py
  data: {one: {path: one.npy, samples: 30}, two: {path: two.npy, samples: 30}}
"""


def adapter(folder):
    spec = importlib.util.spec_from_file_location("adapter", folder / "adapter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nets(tmp_path):
    """Make two networks of a kind, and a plan that corrects their mean."""

    def make(kind, more):
        (tmp_path / "adapter.py").write_text(ADAPTER)
        made = adapter(tmp_path)
        for seed, label in enumerate(("a", "b")):
            torch.manual_seed(seed)
            net = made.network({"kind": kind})
            x = torch.randn(64, 64 if kind == "convolutions" else 6)
            net.train()(x)  # so that batch norms have running statistics of their own
            (tmp_path / label).mkdir(exist_ok=True)
            save_file(net.state_dict(), tmp_path / label / "model.safetensors", {"format": "pt"})
            (tmp_path / label / "config.json").write_text(f'{{"kind": "{kind}"}}')
        for seed, name in enumerate(("one", "two")):
            values = np.random.default_rng(seed).normal(seed, 1 + seed, (40, 64 if kind == "convolutions" else 6))
            np.save(tmp_path / f"{name}.npy", values)
        (tmp_path / "recipe.yaml").write_text(RECIPE + more)
        return build(load(tmp_path / "recipe.yaml"))

    return make


def network(folder, kind, label):
    net = adapter(folder).network({"kind": kind}).eval()
    net.load_state_dict(load_file(folder / label / "model.safetensors"))
    return net


def data(folder, *names):
    return torch.cat([torch.from_numpy(np.load(folder / f"{name}.npy")[:30]).float() for name in names])


def given(net, name, x, side="output"):
    """What a layer gives or is given."""
    seen = []

    def keep(module, args, output):
        seen.append((output if side == "output" else args[0]).detach().double().numpy())

    handle = net.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0]


def moments(rows):
    return Moments(rows.mean(0), rows.std(0), len(rows))


def test_batch_norms_get_what_training_on_all_data_at_once_would_give_them(nets, tmp_path, facts):
    run(nets("convolutions", "correct: {method: repair}\n"), tmp_path / "out", trust_code=True)
    corrected = load_file(tmp_path / "out" / "model.safetensors")

    a, b = (network(tmp_path, "convolutions", label) for label in ("a", "b"))
    merged = network(tmp_path, "convolutions", "a")
    with torch.no_grad():
        for own, other in zip(merged.parameters(), b.parameters(), strict=True):
            own.copy_((own + other) / 2)
    for norm in (merged.bn1, merged.bn2):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        merged.train()(data(tmp_path, "one", "two"))

    for name in ("bn1", "bn2"):
        for field in ("running_mean", "running_var"):
            expected = merged.get_buffer(f"{name}.{field}")
            # In training the second sees what the first normalised by the biased variance: 1 / 4320 of a difference.
            torch.testing.assert_close(corrected[f"{name}.{field}"], expected, rtol=1e-3, atol=1e-4)
    for name in ("conv1.weight", "bn1.weight", "bn2.bias"):
        torch.testing.assert_close(corrected[name], merged.state_dict()[name])

    repaired = network(tmp_path, "convolutions", "out")
    target = goal([moments(given(net, "hidden", data(tmp_path, "one", "two"))) for net in (a, b)])
    has = moments(given(repaired, "hidden", data(tmp_path, "one", "two")))
    np.testing.assert_allclose(has.mean, target.mean, atol=1e-4)
    np.testing.assert_allclose(has.std, target.std, rtol=0.05)


def test_plain_layers_are_corrected_in_the_order_in_which_they_run(nets, tmp_path, facts):
    """Not in that of their names, where the eleventh comes behind the second."""
    run(nets("line", "correct: {method: repair}\n"), tmp_path / "out", trust_code=True)
    x = data(tmp_path, "one", "two")
    a, b, merged = (network(tmp_path, "line", label) for label in ("a", "b", "out"))
    for i in range(11):
        target = goal([moments(given(net, f"layer{i}", x)) for net in (a, b)])
        has = moments(given(merged, f"layer{i}", x))
        np.testing.assert_allclose(has.mean, target.mean, atol=1e-4)
        np.testing.assert_allclose(has.std, target.std, rtol=0.05)


def test_the_output_of_a_network_without_norms_is_corrected_in_its_head(nets, tmp_path, facts):
    run(nets("line", "correct: {method: tact, clamp: 1000}\n"), tmp_path / "out", trust_code=True)
    for task, label in (("one", "a"), ("two", "b")):
        x, corrected = data(tmp_path, task), network(tmp_path, "line", f"out/{task}")
        plain, expert = network(tmp_path, "line", "a"), network(tmp_path, "line", label)
        with torch.no_grad():
            for own, other in zip(plain.parameters(), network(tmp_path, "line", "b").parameters(), strict=True):
                own.copy_((own + other) / 2)
        read = {"plain": given(plain, "head", x, "input"), "expert": given(expert, "head", x, "input")}
        found = next(found for path in kept(facts) if (found := open_facts(path)).label.startswith(task))
        scale = found.get("head.weight", "scale")
        wanted, had = moments(read["expert"]).std, moments(read["plain"]).std
        epsilon = wanted.mean() / (2 * 30)
        np.testing.assert_allclose(scale, (wanted + epsilon) / (had + epsilon), rtol=1e-4)
        z = (read["plain"] - moments(read["plain"]).mean) * scale + moments(read["expert"]).mean
        with torch.no_grad():
            expected = plain.head.double()(torch.from_numpy(z))
            torch.testing.assert_close(corrected(x).double(), expected, rtol=1e-4, atol=1e-4)
