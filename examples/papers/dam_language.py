"""Measure DAM on the bundled language models: which choices matter, and what it recovers beside other merges.

    python examples/papers/dam_language.py --quick       # two baselines and a short training, a minute
    python examples/papers/dam_language.py --choices     # the default with three seeds beside all baselines
    python examples/papers/dam_language.py --seeds 0     # every choice, one at a time, half an hour on one core

The first half of each text of examples/data/validation is calibration data, the second half decides on scales and
choices, and examples/data has the test texts. With ``--cache``, the folder that examples/models/train.py keeps its
packages in, calibration data are windows of the texts that the specialists were trained on, and the whole of the
validation texts decides. What is measured goes to a JSON file; what it holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from mergetool import merge_tensors
from mergetool.anatomy import anatomy
from mergetool.execute.train.loop import Models, Trained, train
from mergetool.execute.train.settings import Settings
from mergetool.facts.dam import apply, slots

HERE = Path(__file__).parents[1]
DOMAINS = ("python", "speeches", "spanish")
WINDOW = 256
MOST = 32  # windows of calibration data from each domain: 8,192 tokens
SEEDS = (0, 1, 2)

DEFAULT = Settings()
SHORT = replace(DEFAULT, steps=100)
"""What choices are measured with, one at a time."""
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

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Read:
    """A model's weights in memory, in float32."""

    tensors: Weights

    def get(self, name: str) -> torch.Tensor:
        """The weight of this name."""
        return self.tensors[name]


def load(name: str) -> Weights:
    """A bundled model's weights."""
    stored = load_file(HERE / "models" / name / "model.safetensors")
    return {key: tensor.float() for key, tensor in stored.items()}


# ------------------------------------------------------------------------------------------------ texts


def windows(text: str) -> torch.Tensor:
    """A text as [windows, WINDOW] tokens; what is left over at its end is not used."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "models" / "base", model_max_length=10**9)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


@dataclass(frozen=True)
class Texts:
    """Windows by domain: to calibrate with, given a seed; to decide by; to report on."""

    calibration: Callable[[str, int], torch.Tensor]
    validation: Mapping[str, torch.Tensor]
    test: Mapping[str, torch.Tensor]


def bundled() -> Texts:
    """Half of each validation text to calibrate with, the other to decide by."""
    held = {name: windows((HERE / "data" / "validation" / f"{name}.txt").read_text("utf-8")) for name in DOMAINS}
    test = {name: windows((HERE / "data" / f"{name}.txt").read_text("utf-8")) for name in DOMAINS}
    later = {name: each[len(each) // 2 :] for name, each in held.items()}
    return Texts(lambda name, seed: held[name][: len(held[name]) // 2][:MOST], later, test)


def packaged(cache: Path) -> Texts:
    """Windows of what the specialists were trained on, drawn by the seed."""
    sys.path.insert(0, str(HERE / "models"))
    from train import gather

    tokens = {name: windows("".join(gather(cache)[name].for_specialist)[:3_000_000]) for name in DOMAINS}
    halves = bundled()
    whole = {name: windows((HERE / "data" / "validation" / f"{name}.txt").read_text("utf-8")) for name in DOMAINS}

    def drawn(name: str, seed: int) -> torch.Tensor:
        order = torch.randperm(len(tokens[name]), generator=torch.Generator().manual_seed(seed))
        return tokens[name][order[:MOST]]

    return Texts(drawn, whole, halves.test)


# ------------------------------------------------------------------------------------------------ measuring


class Bench:
    """The models, and how well any weights predict the texts."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.base = load("base")
        self.specialists = {name: load(name) for name in DOMAINS}
        self.module = LlamaForCausalLM.from_pretrained(HERE / "models" / "base", dtype=torch.float32).eval()
        self.levels = {
            split: {
                name: (self.nll(self.base, split, name), self.nll(self.specialists[name], split, name))
                for name in DOMAINS
            }
            for split in ("validation", "test")
        }

    def nll(self, weights: Weights, split: str, name: str) -> float:
        """Mean nats a token; each window's first token is given. Weights are rounded to bfloat16."""
        rounded = {key: tensor.bfloat16().float() for key, tensor in weights.items()}
        self.module.load_state_dict(rounded, strict=False)
        text = getattr(self.texts, split)[name]
        with torch.inference_mode():
            total = sum(float(self.module(input_ids=few, labels=few).loss) * len(few) for few in text.split(16))
        return total / len(text)

    def recovered(self, weights: Weights, split: str) -> list[float]:
        """(base - merged) / (base - the domain's own specialist) for each domain."""
        result = []
        for name in DOMAINS:
            base, own = self.levels[split][name]
            result.append((base - self.nll(weights, split, name)) / (base - own))
        return result

    def both(self, weights: Weights) -> dict[str, list[float]]:
        """What is recovered of the validation and of the test texts."""
        return {split: self.recovered(weights, split) for split in ("validation", "test")}


def baselines(bench: Bench, quick: bool) -> dict[str, dict[str, Any]]:
    """Every method at the scale, and where it has one the density, that recovers most of the validation texts."""
    lambdas = [0.5, 0.7] if quick else [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    few = [0.2] if quick else [0.2, 0.5, 0.8]
    grids = {
        "average": ("task_arithmetic", [{"lambda": 1 / 3}]),
        "task arithmetic": ("task_arithmetic", [{"lambda": x} for x in lambdas]),
        "TIES": ("ties", [{"lambda": x, "density": d} for x in [*lambdas, 1.5, 2.0] for d in few]),
        "DARE": ("dare_linear", [{"lambda": x, "density": d} for x in lambdas for d in few]),
    }
    result = {}
    for label, (method, grid) in grids.items():
        best: tuple[float, Any, Any] = (float("-inf"), None, None)
        for values in grid:
            merged = merge(method, bench, **values)
            best = max(best, (mean(bench.recovered(merged, "validation")), values, merged), key=lambda each: each[0])
        shown = ", ".join(f"{name} {value:.2g}" for name, value in best[1].items())
        result[f"{label}, {shown}"] = {"runs": [bench.both(best[2])]}
    return result


def merge(method: str, bench: Bench, **values: float) -> Weights:
    """A merge by one of the catalogue's methods."""
    made = {}
    for name, start in bench.base.items():
        tensors = [weights[name].numpy() for weights in bench.specialists.values()]
        merged = merge_tensors(method, tensors, base=start.numpy(), weight=1.0, **values)
        made[name] = torch.from_numpy(merged).float()
    return made


def run(bench: Bench, settings: Settings, folder: Path | None = None) -> tuple[Trained, Weights]:
    """Train coefficients and merge with them."""
    described = json.loads((HERE / "models" / "base" / "config.json").read_text("utf-8"))
    shapes = {name: tuple(tensor.shape) for name, tensor in bench.base.items()}
    drawn = slots(
        anatomy(described, shapes).parts, shapes, granularity=settings.granularity, trainable=settings.trainable
    )
    data = [[{"input_ids": row} for row in bench.texts.calibration(name, settings.seed).split(1)] for name in DOMAINS]
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
        merged[name] = torch.from_numpy(apply(made.values[name], made.axes[name], tensors, base)).float()
    return trained, merged


def measure(bench: Bench, settings: Settings, folder: Path | None) -> dict[str, Any]:
    """One training: how long it took and what its merge recovers."""
    begun = time.perf_counter()
    trained, merged = run(bench, settings, folder)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "steps": trained.steps, "best_step": trained.best_step, **bench.both(merged)}


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
    parser.add_argument("--quick", action="store_true", help="the default for one seed, and few baselines")
    parser.add_argument("--cache", type=Path, help="packages of examples/models/train.py: calibrate on their texts")
    parser.add_argument("--choices", nargs="*", help="choices to measure beside the default, all unless named")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--results", type=Path, help="a JSON file to continue")
    parser.add_argument("--work", type=Path, help="a folder for what a killed run goes on with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(packaged(options.cache) if options.cache else bundled())
    known = options.results is not None and options.results.exists()
    results = json.loads(options.results.read_text("utf-8")) if known else baselines(bench, options.quick)
    quick = {"steps": 40} if options.quick else {}
    chosen = {"default": DEFAULT}
    for name in CHOICES if options.choices is None and not options.quick else options.choices or ():
        chosen[name] = replace(SHORT, **CHOICES[name])
    for seed in options.seeds[: 1 if options.quick else None]:
        for name, settings in chosen.items():
            found = results.setdefault(name, {"runs": []})
            if seed not in [each.get("seed") for each in found["runs"]]:
                made = measure(bench, replace(settings, seed=seed, **quick), options.work)
                found["runs"].append({"seed": seed, **made})
                if options.results is not None:
                    options.results.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
