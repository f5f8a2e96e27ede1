"""The keys a recipe may have and the shape of their values, as Pydantic models."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Discriminator, Field, PlainValidator, Tag, WithJsonSchema, model_validator

from mergetool.recipe.references import TAG, Reference, Strict, Text, wrong
from mergetool.recipe.stages import (
    AlignEntry,
    AnyReport,
    CalibrationEntry,
    CorrectEntry,
    DType,
    EvaluateEntry,
    TrainEntry,
)

UNSUPPORTED = ("slices", "modules", "tokenizer", "chat_template", "override_architecture")
"""Keys of mergekit's that have no meaning here yet."""


def _scalar(value: Any) -> Any:
    if value is None:
        raise wrong("has no value", "write one after the colon, or remove the key")
    if isinstance(value, list | dict):
        kind = "a list" if isinstance(value, list) else "a mapping"
        raise wrong(f"must be a number, true, false or text, not {kind}")
    return value


def _setting_kind(value: Any) -> str:
    if isinstance(value, dict):
        return TAG + "condition"
    if isinstance(value, list):
        return TAG + ("conditions" if any(isinstance(item, dict) for item in value) else "gradient")
    return TAG + "scalar"


def _value_kind(value: Any) -> str:
    return TAG + ("gradient" if isinstance(value, list) else "scalar")


def _names(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise wrong("must be text or a list of texts")
    return names


def _true(value: Any) -> bool:
    if value is not True:
        raise wrong("must be true", "remove the rule to keep the tensors")
    return True


_SPAN = re.compile(r"\s*(-?[0-9]{1,9})\s*(?:-\s*(-?[0-9]{1,9})\s*)?")


def _layers(value: Any) -> list[tuple[int, int]]:
    items = value if isinstance(value, list) else [value]
    spans = []
    for item in items:
        written = isinstance(item, int | str) and not isinstance(item, bool)
        span = _SPAN.fullmatch(str(item)) if written else None
        if span is None:
            raise wrong("must be a number, a range like `0-11` or a list of these")
        first, last = int(span[1]), int(span[2] or span[1])
        if first > last and (first < 0) == (last < 0):
            raise wrong(f"runs backwards: `{item}`", f"write `{last}-{first}`")
        spans.append((first, last))
    if not spans:
        raise wrong("must name at least one layer")
    return spans


_TEXTS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_LAYER: dict[str, Any] = {"type": ["integer", "string"]}
Scalar = Annotated[Any, PlainValidator(_scalar), WithJsonSchema({"type": ["number", "boolean", "string"]})]
Gradient = Annotated[list[Scalar], Field(min_length=1)]
Names = Annotated[list[str], PlainValidator(_names), WithJsonSchema(_TEXTS)]
Layers = Annotated[
    list[tuple[int, int]],
    PlainValidator(_layers),
    WithJsonSchema({"anyOf": [_LAYER, {"type": "array", "items": _LAYER}]}),
]


class ConditionEntry(Strict):
    """A value for the tensors whose name a filter matches."""

    filter: str | None = Field(None, description="Part of the tensor's name, or a glob; absent or `*`: all.")
    value: Annotated[
        Annotated[Scalar, Tag(TAG + "scalar")] | Annotated[Gradient, Tag(TAG + "gradient")],
        Discriminator(_value_kind),
    ] = Field(description="One value, or a gradient over the depth of the model.")


SettingEntry = Annotated[
    Annotated[Scalar, Tag(TAG + "scalar")]
    | Annotated[Gradient, Tag(TAG + "gradient")]
    | Annotated[ConditionEntry, Tag(TAG + "condition")]
    | Annotated[list[ConditionEntry], Tag(TAG + "conditions")],
    Discriminator(_setting_kind),
]
Parameters = dict[str, SettingEntry] | None


class SourceEntry(Strict):
    """A source and what is its own: parameters and data."""

    model: Reference = Field(description="A folder or a Hub repository: `path`, `org/name@revision`.")
    parameters: Parameters = Field(None, description="Parameters of this source.")
    data: Text | None = Field(None, description="The name of its own calibration data; absent: all data.")


class RuleSourceEntry(Strict):
    """A source and its parameters under a rule."""

    model: Reference = Field(description="One of the recipe's models.")
    parameters: Parameters = Field(None, description="Parameters of this source under the rule.")


class WhereEntry(Strict):
    """Which tensors a rule is for; all that is said must hold."""

    part: Names | None = Field(None, description="Roles such as `attention` or `mlp.down`.")
    layers: Layers | None = Field(None, description="`7`, `0-11` or a list; negative: from the end.")
    name: Names | None = Field(None, description="Globs on the tensor's name.")

    @model_validator(mode="after")
    def _some(self) -> WhereEntry:
        if self.part is None and self.layers is None and self.name is None:
            raise wrong("must have at least one of `part`, `layers` and `name`")
        return self


class RuleEntry(Strict):
    """Another treatment for some tensors; the first rule that matches wins."""

    where: WhereEntry
    merge_method: Text | None = Field(None, description="Another method; absent: the recipe's.")
    parameters: Parameters = Field(None, description="Parameters under this rule.")
    models: list[RuleSourceEntry] | None = Field(None, description="Parameters of single sources.")
    keep: Reference | None = Field(None, description="Copy these tensors from this source.")
    drop: Annotated[bool, PlainValidator(_true), WithJsonSchema({"const": True})] | None = Field(
        None, description="Leave these tensors out."
    )

    @model_validator(mode="after")
    def _one(self) -> RuleEntry:
        merges = self.merge_method is not None or self.parameters is not None or self.models is not None
        if merges + (self.keep is not None) + (self.drop is not None) != 1:
            allowed = "either `merge_method`, `parameters` or `models`, or `keep`, or `drop: true`"
            raise wrong(f"must say one thing to do: {allowed}")
        return self


class Document(Strict):
    """A recipe of mergetool."""

    merge_method: Text = Field(description="What becomes of the tensors.")
    base_model: Reference | None = Field(None, description="The model deltas are taken from.")
    models: list[SourceEntry] = Field(min_length=1, description="The sources.")
    parameters: Parameters = Field(None, description="Parameters of the method, for all sources.")
    rules: list[RuleEntry] | None = Field(None, description="Other treatments for some tensors.")
    dtype: DType | None = Field(None, description="The stored dtype; absent: each tensor's own in the base.")
    out_dtype: DType | None = Field(None, description="The stored dtype; wins over `dtype`.")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(0, description="Where random masks begin.")
    output: Text | None = Field(None, description="The folder to write, relative to the recipe's.")
    tokenizer_source: Reference | None = Field(None, description="`base`, or the source whose tokenizer it is.")
    calibration: CalibrationEntry | None = Field(None, description="Data to measure or to train on.")
    align: AlignEntry | None = Field(None, description="How the models are turned to face each other.")
    correct: CorrectEntry | None = Field(None, description="What is put right after the merge.")
    train: TrainEntry | None = Field(None, description="How a method that trains its coefficients does so.")
    evaluate: EvaluateEntry | None = Field(None, description="How a method that tries merged models out scores them.")
    report: AnyReport | None = Field(None, description="What the report of a run shows; `none`: there is none.")
