"""Anonymous memory is bounded by the budget, whatever the size of the model or of its largest tensor."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench.checkpoints import make

from mergetool.storage.header import read_header

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is told by Linux only"),
]

LIMIT = 1_000_000_000
MERGE = """
import sys
from pathlib import Path
import mergetool
plan = mergetool.build(mergetool.load(Path(sys.argv[1])))
mergetool.run(plan, sys.argv[2])
print(plan.memory.peak)
"""
RECIPE = """\
merge_method: ties
base_model: {0}
models: [{{model: {1}, parameters: {{weight: 1}}}}, {{model: {2}, parameters: {{weight: 1}}}}]
parameters: {{density: 0.5, scope: {scope}}}
"""


@pytest.fixture(scope="module")
def inputs():
    """Where large inputs are kept from one run of the tests to the next."""
    home = os.environ.get("MERGETOOL_TEST_CACHE") or Path.home() / ".cache" / "mergetool" / "tests"
    return Path(home) / "checkpoints"


def peak_of(command):
    """The most anonymous memory that a process held while it ran, in bytes; and what it printed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    said, _ = process.communicate()
    assert process.returncode == 0
    return peak, said


def merge(models, output, scope):
    """Merge by TIES in a process of its own; its peak and what the plan had said it would be."""
    recipe = output.with_name("merge.yaml")
    recipe.write_text(RECIPE.format(*models, scope=scope))
    peak, said = peak_of([sys.executable, "-c", MERGE, str(recipe), str(output)])
    made, source = (read_header(folder / "model.safetensors") for folder in (output, models[0]))
    assert made.file_size - made.data_start == source.file_size - source.data_start
    return peak, int(said)


@pytest.fixture
def output(tmp_path):
    """An output that does not stay when the test is over: it has gigabytes."""
    yield tmp_path / "merged"
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


def test_one_tensor_of_half_a_billion_weights_merges_in_less_than_a_gigabyte(inputs, output):
    size = 1 << 29
    models = [make(inputs / f"half-billion-{v}", "tiny", v, {"w": (size,)}) for v in range(3)]
    peak, planned = merge(models, output, "tensor")
    assert peak < LIMIT
    assert peak <= planned
    assert peak < size * 2


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_model_of_a_billion_weights_merges_in_less_than_a_gigabyte(inputs, output, scope):
    models = [make(inputs / f"1.1b-{v}", "1.1b", v) for v in range(3)]
    peak, planned = merge(models, output, scope)
    assert peak < LIMIT
    assert peak <= planned
