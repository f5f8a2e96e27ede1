"""The keys about data and about the stages around the merge, as Pydantic models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import Discriminator, Field, Tag
from pydantic_core import core_schema

from mergetool.recipe.data import Align, AlignGroup, Correct, Data, Evaluate, Report, Train
from mergetool.recipe.references import TAG, Reference, Strict, Text, text_kind, wrong
from mergetool.recipe.spelling import did_you_mean


@dataclass(frozen=True, eq=False)
class Takes:
    """What a key takes, as an annotation of its type: a check whose errors are sentences, and a JSON schema."""

    check: Callable[[Any], Any]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return dict(self.schema)


def number(low: float, high: float = math.inf, above: bool = False) -> Takes:
    """A number from ``low``, or with ``above`` above it, to below ``high``."""
    least = f"above {low:g}" if above else f"at least {low:g}"
    span = least if high == math.inf else f"{least} and below {high:g}"

    def check(value: Any) -> float:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            found = float(value)  # also text: YAML 1.1 reads 1e-2 as text
        except (ValueError, OverflowError):
            raise wrong("must be a number", "write one such as `0.5`") from None
        if not math.isfinite(found):
            raise wrong(f"must be a finite number, not {found}")
        if not (low < found if above else low <= found) or not found < high:
            raise wrong(f"must be {span}, not {found:g}")
        return found

    bounds = {"exclusiveMinimum" if above else "minimum": low, "exclusiveMaximum": high}
    return Takes(check, {"type": "number", **{k: v for k, v in bounds.items() if v != math.inf}})


def count(low: int) -> Takes:
    """A whole number from ``low`` on."""

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong("must be a whole number")
        if not low <= value < 2**63:
            raise wrong(f"must be at least {low}, not {value}" if value < low else "must be below 2⁶³")
        return value

    return Takes(check, {"type": "integer", "minimum": low})


def choices(stage: type, name: str) -> tuple[str, ...]:
    """What a field of a stage may be."""
    found: tuple[str, ...] = get_args(get_type_hints(stage)[name])
    return found


def one_of(*choices: str) -> Takes:
    """A text that is one of these."""

    def check(value: Any) -> str:
        if value not in choices:
            raise wrong(f"must be one of {', '.join(choices)}", did_you_mean(str(value), choices))
        return str(value)

    return Takes(check, {"enum": list(choices)})


def several_of(*choices: str) -> Takes:
    """A list of texts that are among these."""

    def check(value: Any) -> list[str]:
        if not isinstance(value, list) or not value:
            raise wrong(f"must be a list of some of {', '.join(choices)}")
        for item in value:
            if item not in choices:
                raise wrong(f"must be some of {', '.join(choices)}", did_you_mean(str(item), choices))
        return list(dict.fromkeys(value))

    return Takes(check, {"type": "array", "items": {"enum": list(choices)}, "minItems": 1})


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise wrong("must be the name of calibration data, or a list of names")
    return names


_TEXTS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
DataNames = Annotated[list[str], Takes(_names, _TEXTS)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
DType = Annotated[str, one_of("float16", "bfloat16", "float32", "float64")]


class DataEntry(Strict):
    """A data set and how much of it is taken."""

    path: Text = Field(description="A file, relative to the recipe's folder, or `hub:org/name:split`.")
    samples: Annotated[int, count(1)] = Field(
        Data.samples, description="How many samples are taken, spread over the data."
    )
    max_length: Annotated[int, count(2)] = Field(
        Data.max_length, description="The most tokens of a sample; a text is cut into these."
    )
    column: Text | None = Field(
        None, description="What of each row is the sample; absent: `text`, `messages`, or `prompt` and `response`."
    )


class CalibrationEntry(Strict):
    """What the models are run on, to measure them or to train coefficients."""

    data: Annotated[
        dict[
            str,
            Annotated[
                Annotated[Text, Tag(TAG + "text")] | Annotated[DataEntry, Tag(TAG + "mapping")],
                Discriminator(text_kind),
            ],
        ],
        Field(min_length=1, description="Files or data sets by names of your own, which other keys refer to."),
    ]
    adapter: Text | None = Field(
        None, description="A Python file that makes the network and reads the data; runs with `--trust-code` only."
    )


class AlignEntry(Strict):
    """Puts the units of the models in the order of one of them, before they are merged."""

    method: Annotated[str, one_of(*choices(Align, "method"), "none")] = Field(
        description="What shows which units belong together: the weights, or the activations on data."
    )
    reference: Reference | None = Field(
        None, description="The model that keeps its order; absent: the base, or the first model."
    )
    groups: Annotated[list[str], several_of(*get_args(AlignGroup))] = Field(
        list(Align.groups), description="The kinds of units that may change places."
    )
    data: DataNames | None = Field(None, description="Names of calibration data; absent: all.")
    score: Annotated[str, one_of(*choices(Align, "score"))] = Field(
        Align.score,
        description="How activations are compared: each unit as strong as any other, or as strong as it is.",
    )
    max_sweeps: Annotated[int, count(1)] = Field(
        Align.max_sweeps, description="So often are the groups gone through, at most."
    )
    margin: Annotated[float, number(0.0)] = Field(
        Align.margin, description="The least gain over the present order, as a share of a perfect match, to act on."
    )
    seed: Seed | None = Field(None, description="Where the order of the groups begins; absent: the recipe's.")
    verify: bool = Field(Align.verify, description="Check that each model still computes what it did.")


class CorrectEntry(Strict):
    """Puts the statistics of the merged model's activations right."""

    method: Annotated[str, one_of(*choices(Correct, "method"), "none")] = Field(
        description="`repair`: once, towards the models' mean; `tact`: for each task, towards its own model."
    )
    scope: Annotated[str, one_of(*choices(Correct, "scope"))] | None = Field(
        None,
        description="Correct the last representation only, or every layer in turn; absent: `all` for `repair`, "
        "`output` for `tact`.",
    )
    statistic: Annotated[str, one_of(*choices(Correct, "statistic"))] = Field(
        Correct.statistic, description="Correct mean and standard deviation, or the latter alone."
    )
    clamp: Annotated[float, number(1.0)] = Field(
        Correct.clamp, description="No scale is more than this, or less than one over this."
    )
    data: DataNames | None = Field(None, description="Names of calibration data; absent: all.")
    samples: Annotated[int, count(1)] | None = Field(
        None, description="Of each data at most so many samples; absent: all it has."
    )
    fold: Annotated[str, one_of(*choices(Correct, "fold"))] = Field(
        Correct.fold,
        description="Where `tact` keeps its corrections: a model for each task, a file beside the model, or the head.",
    )


class TrainEntry(Strict):
    """How a method that trains its coefficients does so."""

    steps: Annotated[int, count(1)] = Field(Train.steps, description="Steps of AdamW, at most.")
    learning_rate: Annotated[float, number(0.0, above=True)] = Field(Train.learning_rate, description="Its peak rate.")
    schedule: Annotated[str, one_of(*choices(Train, "schedule"))] = Field(
        Train.schedule, description="How the rate falls after the warm-up."
    )
    warmup: Annotated[float, number(0.0, 1.0)] = Field(
        Train.warmup, description="The share of the steps in which the rate rises."
    )
    clip: Annotated[float, number(0.0)] = Field(
        Train.clip, description="The largest norm of a step's gradient; 0: no limit."
    )
    batch_tokens: Annotated[int, count(1)] = Field(
        Train.batch_tokens, description="Tokens of one step, shared evenly by the models' data."
    )
    topk: Annotated[int, count(0)] = Field(
        Train.topk, description="Logits of a teacher kept for each token, the rest count as one; 0: all."
    )
    held_out: Annotated[float, number(0.0, 1.0)] = Field(
        Train.held_out, description="The share of each model's data that stopping is decided on; 0: none."
    )
    every: Annotated[int, count(1)] = Field(
        Train.every, description="Steps between two measurements of what is held out."
    )
    patience: Annotated[int, count(1)] = Field(
        Train.patience, description="Stop once so many measurements in a row brought nothing better."
    )
    seed: Seed | None = Field(None, description="Where the order of the samples begins; absent: the recipe's.")


class EvaluateEntry(Strict):
    """How a method that tries merged models out scores them."""

    data: DataNames | None = Field(None, description="Names of calibration data, each counting the same; absent: all.")
    metric: Annotated[str, one_of(*choices(Evaluate, "metric"))] = Field(
        Evaluate.metric, description="The loss, in nats a prediction, or the share of predictions that are right."
    )
    dtype: DType | None = Field(
        None, description="What a model that is tried is rounded to; absent: the dtype that is stored."
    )


class ReportEntry(Strict):
    """What the report of a run shows besides what the run finds out anyway."""

    cka: bool | None = Field(
        None,
        description="Compare every two models on the same data, layer by layer; absent: where the run looks at whole "
        "models anyway, and no more than 2 GB of weights are read for it.",
    )
    data: DataNames | None = Field(None, description="Names of calibration data to compare them on; absent: all.")
    samples: Annotated[int, count(1)] = Field(Report.samples, description="Of each data at most so many samples.")


NoReport = Annotated[str, one_of("none")]
AnyReport = Annotated[
    Annotated[NoReport, Tag(TAG + "text")] | Annotated[ReportEntry, Tag(TAG + "mapping")],
    Discriminator(text_kind),
]
