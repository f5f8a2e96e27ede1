"""What training of coefficients can be told, checked all at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mergetool.errors import PlanError, Problem
from mergetool.facts.dam import FORMS, GRANULARITIES, KINDS, Form, Granularity, Kind
from mergetool.recipe.data import Train

Loss = Literal["kl", "js", "mse", "entropy"]
Schedule = Literal["constant", "linear", "cosine"]

PENALTIES = ("similarity", "overlap", "weighted_overlap", "l1", "l2")


@dataclass(frozen=True)
class Settings:
    """How coefficients are trained.

    Attributes:
        form: ``delta`` weighs what each source changed of the base, ``full`` the sources themselves.
        granularity: one coefficient for each ``column``, ``row``, ``tensor`` or ``layer`` of each source, or with
            ``row+column`` for each entry the sum of its row's and its column's.
        trainable: the parts that are trained, of ``linear``, ``embedding`` and ``norm``; others stay the average.
        initial: the coefficient to start from; None is 1/N.
        sum_to_one: whether the coefficients of a column always sum to one over the sources.
        loss: what is minimised against the source that knows the data: ``kl``, ``js``, ``mse``, ``entropy``.
        temperature: of ``kl`` and ``js``, and of the KL that is watched on held-out data.
        similarity: factor of the mean cosine of two sources' coefficients, summed over tensors.
        overlap: factor of the smaller of two sources' coefficients, in magnitude.
        weighted_overlap: the same where deltas interfere; needs a base.
        l1: factor of the L1 norms of the coefficients.
        l2: factor of their L2 norms, which are not squared.
        steps: optimizer steps at most.
        learning_rate: the peak rate of AdamW, which has no weight decay here.
        schedule: how the rate falls after the warm-up.
        warmup: the share of the steps in which the rate rises.
        clip: the largest norm of a step's gradient; 0 is no limit.
        batch_tokens: tokens of one step, shared evenly by the sources' data.
        topk: logits that are kept of each position of a teacher; 0 keeps all.
        held_out: the share of each source's data that is not trained on and decides when to stop; 0 is none.
        every: steps between two looks at the held-out data.
        patience: looks without a better KL after which training stops.
        save_every: steps after which a killed training continues; 0 saves nothing.
        seed: of the order of the data and of what is held out.
    """

    form: Form = "delta"
    granularity: Granularity = "row+column"
    trainable: tuple[Kind, ...] = KINDS
    initial: float | None = None
    sum_to_one: bool = False
    loss: Loss = "kl"
    temperature: float = 1.0
    similarity: float = 0.0
    overlap: float = 0.0
    weighted_overlap: float = 0.0
    l1: float = 0.0
    l2: float = 0.0
    steps: int = Train.steps
    learning_rate: float = Train.learning_rate
    schedule: Schedule = Train.schedule
    warmup: float = Train.warmup
    clip: float = Train.clip
    batch_tokens: int = Train.batch_tokens
    topk: int = Train.topk
    held_out: float = Train.held_out
    every: int = Train.every
    patience: int = Train.patience
    save_every: int = 50
    seed: int = Train.seed

    def __post_init__(self) -> None:
        problems = [*self._unknown(), *self._out_of_range()]
        if self.form == "full" and self.weighted_overlap:
            problems.append(Problem("weighted_overlap compares deltas", "form: full", "take the form delta"))
        if problems:
            raise PlanError(problems)

    def _unknown(self) -> list[Problem]:
        allowed = {
            "form": FORMS,
            "granularity": GRANULARITIES,
            "loss": get_args(Loss),
            "schedule": get_args(Schedule),
        }
        found = [
            Problem(f"{name} must be one of {', '.join(words)}, not {getattr(self, name)!r}")
            for name, words in allowed.items()
            if getattr(self, name) not in words
        ]
        strange = [part for part in self.trainable if part not in KINDS]
        if strange or not self.trainable:
            what = repr(strange[0]) if strange else "nothing"
            found.append(Problem(f"trainable must name some of {', '.join(KINDS)}, not {what}"))
        return found

    def _out_of_range(self) -> list[Problem]:
        above = {"temperature": 0.0, "learning_rate": 0.0}
        least = {**dict.fromkeys(PENALTIES, 0.0), "warmup": 0.0, "clip": 0.0, "held_out": 0.0, "topk": 0, "seed": 0}
        least |= {"steps": 1, "batch_tokens": 1, "every": 1, "patience": 1, "save_every": 0}
        below = {"warmup": 1.0, "held_out": 1.0}
        values = {name: getattr(self, name) for name in [*above, *least]}
        return [
            *(Problem(f"{n} must be a finite number, not {v}") for n, v in values.items() if not math.isfinite(v)),
            *(Problem(f"{n} must be above {low:g}, not {values[n]}") for n, low in above.items() if values[n] <= low),
            *(Problem(f"{n} must be at least {low:g}, not {values[n]}") for n, low in least.items() if values[n] < low),
            *(
                Problem(f"{n} must be below {high:g}, not {values[n]}")
                for n, high in below.items()
                if values[n] >= high
            ),
        ]

    @property
    def penalties(self) -> dict[str, float]:
        """The factors of the penalties on the coefficients."""
        return {name: getattr(self, name) for name in PENALTIES}

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return {**asdict(self), "trainable": list(self.trainable)}

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        done = (step - warm) / max(1, self.steps - warm)
        falls = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
        return self.learning_rate * falls[self.schedule]
