"""What training DAM's coefficients costs: seconds of the bundled example, memory of a model that dominates it.

    python -m tests.bench.training                 the example, then 0.3 B parameters with 2 and with 4 sources
    python -m tests.bench.training --sources 2     one of them

The 0.3 B checkpoints are made in `$MERGETOOL_BENCH`, 0.6 GB each. Memory is the peak of RssAnon during the run less
what the process held once torch and transformers were imported, beside what the plan states, and beside the promise:
one and a half models in float32 and one layer of all sources. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from .checkpoints import SIZES, make, shapes, weights
from .measure import run
from .work import ROOT

FOLDER = Path(os.environ.get("MERGETOOL_BENCH") or Path.home() / ".cache" / "mergetool" / "bench")
SIZE = "0.3b"
STEPS, ROWS, LENGTH = 3, 1, 16  # short, so that weights are nearly all there is in memory
EXAMPLE = ROOT / "examples" / "dam.yaml"
TOKENIZER = ROOT / "examples" / "models" / "base"
TEXT = ROOT / "examples" / "data" / "speeches.txt"


def checkpoints(sources: int) -> list[Path]:
    """A base and fine-tunes of it with a tokenizer, which knows but a few of their tokens."""
    made = [make(FOLDER / f"{SIZE}-{variant}", SIZE, variant) for variant in range(sources + 1)]
    for folder in made:
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, folder)
    return made


def recipe(folders: Sequence[Path]) -> str:
    """A short training on short texts."""
    base, *sources = map(str, folders)
    data = {"path": str(TEXT), "samples": 2 * ROWS, "max_length": LENGTH}
    train = {"steps": STEPS, "batch_tokens": ROWS * LENGTH * len(sources), "held_out": 0.5, "every": STEPS}
    told = {"merge_method": "dam", "base_model": base, "models": [{"model": each} for each in sources]}
    return json.dumps({**told, "calibration": {"data": {"text": data}}, "train": train, "dtype": "bfloat16"})


def anonymous() -> int:
    """The bytes of anonymous memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


class Peak(threading.Thread):
    """Looks at the memory of this process until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()

    def run(self) -> None:
        """Look every few milliseconds."""
        while not self.ended.wait(0.005):
            self.most = max(self.most, anonymous())


def trained(text: str) -> dict[str, float]:
    """Run a recipe in this process: peak memory, what the plan said of it, and seconds a step."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mergetool

    torch.ones(256, 256, requires_grad=True).matmul(torch.ones(256, 256)).sum().backward()  # what torch loads late
    plan = mergetool.build(mergetool.load(text))
    stage = next(stage for stage in plan.stages if stage.name == "train")
    held, peak, began = anonymous(), Peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MERGETOOL_CACHE"] = folder  # nothing is known from before
        peak.start()
        mergetool.run(plan, Path(folder) / "merged")
        peak.ended.set(), peak.join()
    return {"peak": peak.most - held, "stated": stage.memory, "seconds": time.perf_counter() - began}


def memory(sources: int) -> str:
    """A line of the table, measured in a process of its own."""
    text = recipe(checkpoints(sources))
    command = [sys.executable, "-m", "tests.bench.training", "--child", text]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    tensors = dict(shapes(SIZES[SIZE]))
    model = 4 * weights(tensors)
    layer = 4 * weights({name: shape for name, shape in tensors.items() if name.startswith("model.layers.0.")})
    promise = 1.5 * model + sources * layer
    columns = [model, promise, found["stated"], found["peak"]]
    shown = " | ".join(f"{each / 1e9:.2f} GB" for each in columns)
    return f"| {sources} | {shown} | {found['peak'] / model:.2f} | {found['seconds']:.0f} s |"


def example() -> str:
    """How long the bundled example takes from nothing, start-up and all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mergetool.cli", "run", str(EXAMPLE), f"{folder}/merged"]
        cost = run(command, {"MERGETOOL_CACHE": folder})
    return f"{cost.wall:.0f} s, {cost.user + cost.system:.0f} s of processors' time"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", type=int, nargs="*", default=[2, 4], help="of the large models")
    parser.add_argument("--no-example", action="store_true", help="leave the bundled models out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(trained(options.child)))
        return
    if not options.no_example:
        print(f"examples/dam.yaml: {example()}", flush=True)
    head = ["sources", "a model in float32", "1.5 models + a layer of all", "stated by the plan", "peak", "models"]
    print(f"| {' | '.join([*head, 'seconds'])} |\n|{'---|' * (len(head) + 1)}")
    for sources in options.sources:
        print(memory(sources), flush=True)


if __name__ == "__main__":
    main()
