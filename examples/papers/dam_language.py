"""Measure DAM on the bundled language models: which choices matter. `language.py` compares it with other merges.

    python examples/papers/dam_language.py --quick       # a short training
    python examples/papers/dam_language.py --choices     # the default with three seeds
    python examples/papers/dam_language.py --seeds 0     # every choice, one at a time, half an hour on one core

The first half of each text of examples/data/validation is calibration data, the second half decides on scales and
choices, and examples/data has the test texts. With ``--cache``, the folder that examples/models/train.py keeps its
packages in, calibration data are windows of the texts that the specialists were trained on, and the whole of the
validation texts decides. What is measured goes to a JSON file; what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from language_models import DOMAINS, MODELS, Bench, Weights, held_out, specialists_texts, windows

from mergetool.anatomy import anatomy
from mergetool.execute.train.loop import Models, Trained, train
from mergetool.execute.train.settings import Settings
from mergetool.facts.dam import apply, slots

MOST = 32  # windows of calibration data from each domain: 8,192 tokens
SEEDS = (0, 1, 2)

DEFAULT = Settings()
SHORT = replace(DEFAULT, granularity="column", steps=100, learning_rate=0.1)
"""What choices are measured with, one at a time: columns alone."""
BOTH = "row+column"
CHOICES: dict[str, dict[str, Any]] = {
    "short": {},
    "form full": {"form": "full"},
    "form full, learning_rate 0.03": {"form": "full", "learning_rate": 0.03},
    "form full, learning_rate 0.03, sum_to_one": {"form": "full", "learning_rate": 0.03, "sum_to_one": True},
    "form full, learning_rate 0.03, trainable linear": {
        "form": "full",
        "learning_rate": 0.03,
        "trainable": ("linear",),
    },
    "trainable linear": {"trainable": ("linear",)},
    "trainable embedding": {"trainable": ("embedding",)},
    "trainable linear, embedding": {"trainable": ("linear", "embedding")},
    "granularity row+column": {"granularity": BOTH},
    "granularity row+column, learning_rate 0.03": {"granularity": BOTH, "learning_rate": 0.03},
    "granularity row+column, learning_rate 0.2": {"granularity": BOTH, "learning_rate": 0.2},  # the default's
    "granularity row+column, learning_rate 0.3": {"granularity": BOTH, "learning_rate": 0.3},
    "granularity row+column, learning_rate 1": {"granularity": BOTH, "learning_rate": 1.0},
    "granularity row": {"granularity": "row"},
    "granularity tensor": {"granularity": "tensor"},
    "granularity layer": {"granularity": "layer"},
    "loss js": {"loss": "js"},
    "loss mse": {"loss": "mse"},
    "loss entropy": {"loss": "entropy"},
    "learning_rate 0.01": {"learning_rate": 0.01},
    "learning_rate 0.03": {"learning_rate": 0.03},
    "learning_rate 0.3": {"learning_rate": 0.3},
    "learning_rate 1": {"learning_rate": 1.0},
    "topk 16": {"topk": 16},
    "topk 0 (all)": {"topk": 0},
    "temperature 2": {"temperature": 2.0},
    "temperature 4": {"temperature": 4.0},
    "similarity 0.01": {"similarity": 0.01},
    "sum_to_one": {"sum_to_one": True},
    "initial 0.7": {"initial": 0.7},
    "schedule constant": {"schedule": "constant"},
    "batch_tokens 2048": {"batch_tokens": 2048},
    "held_out 0": {"held_out": 0.0},
}

Draw = Callable[[str, int], torch.Tensor]
"""The windows to calibrate with, of a domain and a seed."""


@dataclass(frozen=True)
class Read:
    """A model's weights in memory, in float32."""

    tensors: Weights

    def get(self, name: str) -> torch.Tensor:
        """The weight of this name."""
        return self.tensors[name]


def bundled() -> tuple[Bench, Draw]:
    """Half of each validation text to calibrate with, the other to decide by."""
    held = {name: windows(held_out("validation", name)) for name in DOMAINS}
    later = {name: each[len(each) // 2 :] for name, each in held.items()}
    return _bench(later), lambda name, seed: held[name][: len(held[name]) // 2][:MOST]


def packaged(cache: Path) -> tuple[Bench, Draw]:
    """Windows of what the specialists were trained on, drawn by the seed; whole validation texts to decide by."""
    tokens = {name: windows(text) for name, text in specialists_texts(cache).items()}

    def drawn(name: str, seed: int) -> torch.Tensor:
        order = torch.randperm(len(tokens[name]), generator=torch.Generator().manual_seed(seed))
        return tokens[name][order[:MOST]]

    return _bench({name: windows(held_out("validation", name)) for name in DOMAINS}), drawn


def _bench(validation: Mapping[str, torch.Tensor]) -> Bench:
    return Bench({"validation": validation, "test": {name: windows(held_out("test", name)) for name in DOMAINS}})


# ------------------------------------------------------------------------------------------------ measuring


def run(bench: Bench, draw: Draw, settings: Settings, folder: Path | None = None) -> tuple[Trained, Weights]:
    """Train coefficients and merge with them."""
    described = json.loads((MODELS / "base" / "config.json").read_text("utf-8"))
    shapes = {name: tuple(tensor.shape) for name, tensor in bench.base.items()}
    drawn = slots(
        anatomy(described, shapes).parts, shapes, granularity=settings.granularity, trainable=settings.trainable
    )
    data = [[{"input_ids": row} for row in draw(name, settings.seed).split(1)] for name in DOMAINS]
    models = Models(
        module=bench.module,
        sources={name: Read(weights) for name, weights in bench.specialists.items()},
        slots=drawn,
        base=("base", Read(bench.base)),
    )
    trained = train(models, data, settings, folder=folder)
    made = trained.coefficients
    merged = {}
    for name, start in bench.base.items():
        tensors = [weights[name].numpy() for weights in bench.specialists.values()]
        base = start.numpy() if settings.form == "delta" else None
        merged[name] = torch.from_numpy(apply(made.of(name), tensors, base)).float()
    return trained, merged


def measure(bench: Bench, draw: Draw, settings: Settings, folder: Path | None) -> dict[str, Any]:
    """One training: how long it took and what its merge recovers."""
    begun = time.perf_counter()
    trained, merged = run(bench, draw, settings, folder)
    seconds = time.perf_counter() - begun
    scores = {split: bench.score(merged, split).recovered for split in ("validation", "test")}
    return {"seconds": seconds, "steps": trained.steps, "best_step": trained.best_step, **scores}


# ------------------------------------------------------------------------------------------------ reporting


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Everything measured, in Markdown; means over the seeds."""
    lines = ["| | validation | test | worst domain | of seeds | seconds | best step |", "|---|---|---|---|---|---|---|"]
    for label, found in results.items():
        runs = found["runs"]
        validation, test = (mean(mean(each[split]) for each in runs) for split in ("validation", "test"))
        worst = mean(min(each["test"]) for each in runs)
        spread = f"{min(mean(each['test']) for each in runs):.3f} – {max(mean(each['test']) for each in runs):.3f}"
        spent = [
            f"{mean(each[key] for each in runs):.0f}" if key in runs[0] else "" for key in ("seconds", "best_step")
        ]
        cells = (f"{validation:.3f}", f"{test:.3f}", f"{worst:.3f}", spread if len(runs) > 1 else "", *spent)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of the default for one seed")
    parser.add_argument("--cache", type=Path, help="packages of examples/models/train.py: calibrate on their texts")
    parser.add_argument("--choices", nargs="*", help="choices to measure beside the default, all unless named")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--results", type=Path, help="a JSON file to continue")
    parser.add_argument("--work", type=Path, help="a folder for what a killed run goes on with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench, draw = packaged(options.cache) if options.cache else bundled()
    known = options.results is not None and options.results.exists()
    results = json.loads(options.results.read_text("utf-8")) if known else {}
    quick = {"steps": 40} if options.quick else {}
    chosen = {"default": DEFAULT}
    for name in CHOICES if options.choices is None and not options.quick else options.choices or ():
        chosen[name] = replace(SHORT, **CHOICES[name])
    for seed in options.seeds[: 1 if options.quick else None]:
        for name, settings in chosen.items():
            found = results.setdefault(name, {"runs": []})
            if seed not in [each.get("seed") for each in found["runs"]]:
                made = measure(bench, draw, replace(settings, seed=seed, **quick), options.work)
                found["runs"].append({"seed": seed, **made})
                if options.results is not None:
                    options.results.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
