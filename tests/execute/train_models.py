"""A small network, sources that differ from its base, and data on which each is the teacher; for tests of training."""

import numpy as np
import pytest
import torch

from mergetool.anatomy import anatomy
from mergetool.execute.train import loop
from mergetool.execute.train.loop import Models
from mergetool.execute.train.rows import streams
from mergetool.execute.train.settings import Settings
from mergetool.facts.dam import slots

VOCABULARY, WIDTH, TIME = 23, 8, 6
CONFIG = {"model_type": "toy", "vocab_size": VOCABULARY, "num_hidden_layers": 2, "tie_word_embeddings": True}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(WIDTH)
        self.mlp = torch.nn.ModuleDict(
            {"up_proj": torch.nn.Linear(WIDTH, 12), "down_proj": torch.nn.Linear(12, WIDTH, bias=False)}
        )

    def forward(self, x):
        # What came before is seen through a running mean, so that padding on the right is not.
        time = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).view(1, -1, 1)
        mixed = self.input_layernorm(x).cumsum(1) / time
        return x + self.mlp["down_proj"](self.mlp["up_proj"](mixed).tanh())


class Toy(torch.nn.Module):
    """A language model whose input and output embeddings are one tensor."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.model.layers = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, attention_mask=None):
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(x)


class Source:
    """Weights in memory that count how often they are read."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, 0

    def get(self, name):
        self.reads += 1
        return self.tensors[name]


def weights(seed, near=None, far=0.5):
    """Random weights by the names of the toy, around those of another model if there is one."""
    torch.manual_seed(seed)
    made = {}
    for name, parameter in Toy().named_parameters():
        start = parameter.detach() if near is None else near.tensors[name]
        made[name] = start + far * torch.randn(parameter.shape) * (0.0 if near is None else 1.0)
    return Source(made)


def models(count=2, granularity="row+column", trainable=("linear", "embedding", "norm"), dtype=torch.float32, **more):
    base = weights(0)
    sources = {f"source{i}": weights(i + 1, base) for i in range(count)}
    shapes = {name: tuple(tensor.shape) for name, tensor in base.tensors.items()}
    drawn = slots(anatomy(CONFIG, shapes).parts, shapes, granularity=granularity, trainable=trainable)
    torch.manual_seed(99)
    return Models(Toy().to(dtype), sources, drawn, ("base", base), dtype=dtype, **more)


def texts(seed, count=10, lengths=(TIME,)):
    """Rows of tokens of these lengths in turn."""
    torch.manual_seed(seed)
    made = []
    for i in range(count):
        length = lengths[i % len(lengths)]
        ids = torch.randint(VOCABULARY, (1, length))
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def data(count=2, **more):
    return [texts(100 + i, **more) for i in range(count)]


QUICK = Settings(steps=12, batch_tokens=24, every=3, learning_rate=3e-2, topk=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small take longer to share than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values_of(trained):
    return trained.coefficients.values


def same(first, second):
    """Whether two trainings gave the same coefficients, to the bit."""
    one, other = values_of(first), values_of(second)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def objective_of(given, rows, settings):
    """What a training would look at, without training."""
    parts = streams(rows, settings.held_out, settings.batch_tokens, settings.seed)
    return loop._objective(given, parts, settings, None)
