"""What matching the units of two models takes in memory, beside what the plan states of it.

    python -m tests.bench.matching                 4096 and 8192 hidden units, by weights and by activations
    python -m tests.bench.matching --units 2048    a quick look

Two models that have nothing to do with each other, so that the whole assignment is solved: one narrow layer with many
hidden units, whose scores are nearly all there is in memory. They are made in a folder for the while. Memory is the
peak of RssAnon during the matching less what the process held once all libraries were imported. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .checkpoints import Size, make, shapes
from .training import TEXT, TOKENIZER, Peak, anonymous
from .work import ROOT

METHODS = ("weight_matching", "activation_matching")
HIDDEN, VOCABULARY = 64, 4096


def models(folder: Path, units: int) -> list[Path]:
    """Two models without a common start: the numbers of a tensor follow from its place in the file."""
    size = Size(HIDDEN, 1, units, 4, 4, VOCABULARY)
    tensors = dict(shapes(size))
    made = [
        make(folder / "one", size, tensors=tensors),
        make(folder / "other", size, tensors=dict(reversed(tensors.items()))),
    ]
    for each in made:
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, each)
    return made


def recipe(folder: Path, units: int, method: str) -> str:
    """An average of the two, aligned."""
    told = {
        "merge_method": "linear",
        "models": [{"model": str(each)} for each in models(folder, units)],
        "parameters": {"weight": 0.5},
        "align": {"method": method, "groups": ["mlp"], "verify": False},
        "calibration": {"data": {"text": {"path": str(TEXT), "samples": 4, "max_length": 128}}},
    }
    return json.dumps(told)


def matched(text: str) -> dict[str, float]:
    """Match the models of a recipe in this process: peak memory, what the plan said of it, and seconds."""
    import scipy.optimize  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mergetool
    from mergetool.execute.align import alignment

    torch.ones(256, 256).matmul(torch.ones(256, 256))  # what torch loads late
    plan = mergetool.build(mergetool.load(text))
    stage = next(stage for stage in plan.stages if stage.name == "align")
    held, peak, began = anonymous(), Peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        peak.start()
        alignment(plan, root=Path(root))
        peak.ended.set(), peak.join()
    return {"peak": peak.most - held, "stated": stage.memory, "seconds": time.perf_counter() - began}


def measured(units: int, method: str) -> dict[str, float]:
    """The cost of matching by a method, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.bench.matching", "--child", recipe(Path(folder), units, method)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--units", type=int, nargs="*", default=[4096, 8192], help="hidden units")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(matched(options.child)))
        return
    head = ["method", "units n", "stated by the plan", "peak", "bytes for each of n²", "seconds"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for units in options.units:
        for method in METHODS:
            found = measured(units, method)
            shown = f"{found['stated'] / 1e9:.2f} GB | {found['peak'] / 1e9:.2f} GB | {found['peak'] / units**2:.1f}"
            print(f"| `{method}` | {units} | {shown} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
