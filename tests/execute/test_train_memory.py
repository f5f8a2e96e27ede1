"""What training keeps in memory: the merged model, and one tensor at a time of all that it is merged from."""

import subprocess
import sys
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from mergetool.anatomy import Part  # noqa: E402
from mergetool.execute.train.student import Student, hollow, same_names  # noqa: E402
from mergetool.facts.dam import slots  # noqa: E402
from mergetool.facts.dam_merge import Reads, merged  # noqa: E402

LAYERS, WIDTH, SOURCES = 12, 512, 4
LAYER = WIDTH * WIDTH * 4  # bytes


class Meter(TorchDispatchMode):
    """The bytes of all tensors made while it is on, now and at most; views count once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    def forward(self, x):
        for layer in self.mlp:
            x = layer(x).tanh()
        return x


class Generated:
    """Weights that exist only while somebody holds them."""

    def __init__(self, seed):
        self.seed = seed

    def get(self, name):
        maker = torch.Generator().manual_seed(hash((self.seed, int(name.split(".")[1]))))
        return torch.randn(WIDTH, WIDTH, generator=maker) / WIDTH**0.5


def peak_of(step):
    """The peak of a step in layers, and the gradients it found."""
    names = [f"mlp.{i}.weight" for i in range(LAYERS)]
    parts = {name: Part("mlp.up", "mlp", i, LAYERS, 0.0, None, None, False) for i, name in enumerate(names)}
    drawn = slots(parts, dict.fromkeys(names, (WIDTH, WIDTH)), granularity="column")
    sources = [Generated(seed) for seed in range(SOURCES)]
    values = {name: torch.full((SOURCES, WIDTH), 1 / SOURCES, requires_grad=True) for name in names}
    torch.manual_seed(0)
    x = torch.randn(2, WIDTH)
    with Meter() as meter:
        step(drawn, sources, values, x)
    return meter.peak / LAYER, {name: value.grad for name, value in values.items()}


def streamed(drawn, sources, values, x):
    module = hollow(Net())
    student = Student(module, same_names(module, list(values)), {s.name: Reads(s, sources) for s in drawn})
    student.logits(student.weights(lambda name: [values[name]]), {"x": x}).square().sum().backward()


def naive(drawn, sources, values, x):
    for name, value in values.items():
        stack = torch.stack([source.get(name) for source in sources])
        x = (x @ (stack * value.unsqueeze(1)).sum(0).T).tanh()
    x.square().sum().backward()


@pytest.mark.slow
def test_a_step_keeps_one_merged_model_and_a_few_tensors():
    plain, wanted = peak_of(naive)
    found, gradients = peak_of(streamed)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    # The gradients of all weights at once would be another model.
    assert LAYERS <= found < 1.5 * LAYERS
    assert plain > SOURCES * LAYERS


@pytest.mark.parametrize("granularity", ["row+column", "column", "row"])
def test_a_weight_needs_its_base_one_source_and_its_gradient_and_no_whole_delta(granularity):
    shape = (4096, 1024)
    parts = {"w": Part("mlp.up", "mlp", 0, 1, 0.0, None, None, False)}
    (slot,) = slots(parts, {"w": shape}, granularity=granularity)

    class Random:
        def get(self, name):
            return torch.randn(shape)

    values = [torch.full(each.coefficients(SOURCES), 0.5, requires_grad=True) for each in slot.sets]
    with Meter() as meter:
        weight = merged(values, Reads(slot, [Random()] * SOURCES, Random()))
        forward, meter.peak = meter.peak, meter.now
        weight.backward(torch.ones(shape))
    size = 4 * shape[0] * shape[1]
    assert 3 * size <= forward < 3.6 * size  # the weight, the base, a source
    assert 4 * size <= meter.peak < 4.6 * size  # and the gradient


_HEAP = """
import re
import numpy as np
from mergetool.execute.forward.heap import give_back_large
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) >> 10
give_back_large()
np.ones(6 << 20, np.uint8)
before, small = held(), []
large = [(np.ones(3 << 20, np.uint8), small.append(np.ones(3000, np.uint8)))[0] for _ in range(60)]
assert held() > before + 150
del large
print(held() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is told by Linux only")
def test_large_blocks_go_back_to_the_system_with_small_ones_between_them():
    done = subprocess.run([sys.executable, "-c", _HEAP], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20
