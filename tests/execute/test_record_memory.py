"""Facts of a model of a billion weights are measured in less memory than its weights take."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from bench.checkpoints import make

from execute.test_memory import inputs, peak_of  # noqa: F401 - a fixture
from mergetool.execute.fact_folder import open_facts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is told by Linux only"),
]

LIMIT = 2_000_000_000
RECORD = """
import sys
from pathlib import Path
import torch
from mergetool.checkpoint.checkpoint import open_checkpoint
from mergetool.execute.forward.model import open_model
from mergetool.execute.forward.weights import open_weights
from mergetool.execute.record import record
folder, root, stream, *names = sys.argv[1:]
ids = torch.randint(0, 32000, (4, 128), generator=torch.Generator().manual_seed(0))
batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
checkpoint = open_checkpoint(folder)
with open_weights(checkpoint) as weights:
    model = open_model(checkpoint.config, weights, folder)
    how = {"made_of": {}, "names": names or None, "stream": stream == "blocks"}
    print(record(model, batches, ["gram"], root=Path(root), **how).path)
"""
NAMES = [f"model.layers.{i}.{name}.weight" for i in (0, 21) for name in ("self_attn.q_proj", "mlp.down_proj")]


def test_gram_matrices_of_a_billion_weights_block_by_block(inputs, tmp_path):  # noqa: F811 - a fixture
    model = make(inputs / "1.1b-0", "1.1b", 0)
    command = [sys.executable, "-c", RECORD, str(model), str(tmp_path)]
    peak, said = peak_of([*command, "blocks"])
    assert peak < LIMIT
    streamed = open_facts(Path(said.strip()))
    assert len(streamed.names) == 22 * 7 + 1
    _, said = peak_of([*command, "whole", *NAMES])
    whole = open_facts(Path(said.strip()))
    for name in NAMES:
        expected = whole.get(name, "gram")
        np.testing.assert_allclose(streamed.get(name, "gram"), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
