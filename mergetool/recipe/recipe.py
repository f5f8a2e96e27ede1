"""A recipe that was read: what is to be merged, how, and where its text says so."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergetool.errors import Problem
from mergetool.recipe.catalogue import methods
from mergetool.recipe.data import Align, Calibration, Correct, Data, Evaluate, Report, Train
from mergetool.recipe.rules import Rule
from mergetool.recipe.settings import UNSET, Condition, Setting, evaluate
from mergetool.recipe.tree import Node, Path, Scalar
from mergetool.recipe.usage import Usage

if TYPE_CHECKING:
    from mergetool.anatomy import Part
    from mergetool.methods import Method

Level = tuple[Path, Mapping[str, Setting]]


@dataclass(frozen=True)
class Source:
    """A model to merge and what is its own: parameters and data."""

    reference: str
    parameters: Mapping[str, Setting]
    data: str | None = None
    """The name of its own calibration data; None: it has none of its own, and all data are its."""


@dataclass(frozen=True)
class Resolved:
    """The parameters of a method for one tensor."""

    values: Mapping[str, Any]
    """By the recipe's name: one value, or for a parameter of each source a tuple in the sources' order."""
    arguments: Mapping[str, Any]
    """The same by the names of the method's arguments."""
    problems: tuple[Problem, ...]
    """What is missing or out of range; the parameters concerned are left out above, also those reported before."""


@dataclass(frozen=True)
class Recipe:
    """What is to be merged and how; made by :func:`mergetool.recipe.load`."""

    merge_method: str
    base_model: str | None
    models: tuple[Source, ...]
    parameters: Mapping[str, Setting]
    rules: tuple[Rule, ...]
    dtype: str | None
    out_dtype: str | None
    seed: int
    output: str | None
    tokenizer_source: str | None
    text: str = field(repr=False)
    """The recipe as run: the file's text, or with overrides the changed recipe."""
    folder: pathlib.Path | None = None
    """What relative paths are relative to; None for a recipe that is no file."""
    reported: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """Parameters about which the text's problems say all there is to say; of none where it has no problems."""
    tree: Node = field(default_factory=lambda: Node({}, ""), repr=False, compare=False)
    calibration: Calibration | None = None
    align: Align | None = None
    correct: Correct | None = None
    train: Train | None = None
    evaluate: Evaluate | None = None
    report: Report | None = None

    def where(self, *path: str | int) -> str:
        """The ``file:line:column`` of what is at a path, or of what is nearest around it."""
        return self.tree.nearest(path).place

    @cached_property
    def positions(self) -> dict[str, int]:
        """The index of every model by its reference."""
        return {source.reference: i for i, source in enumerate(self.models)}

    @property
    def stored_dtype(self) -> str | None:
        """The dtype of the output; None: each tensor's own in the base."""
        return self.out_dtype or self.dtype

    def method(self, rule: Rule | None = None) -> Method:
        """The method of a rule's tensors, or of those under no rule."""
        return methods()[(rule and rule.merge_method) or self.merge_method]

    @property
    def sources(self) -> tuple[str, ...]:
        """Every model whose tensors may be read: the models in order, before them a base that is used unlisted."""
        listed = tuple(source.reference for source in self.models)
        if self.base_model is None or self.base_model in listed:
            return listed
        merging = [self.method(), *(self.method(rule) for rule in self.rules if not (rule.keep or rule.drop))]
        used = any(method.base != "ignored" for method in merging)
        kept = any(rule.keep == self.base_model for rule in self.rules)
        return (self.base_model, *listed) if used or kept else listed

    def merged_by(self, method: Method) -> tuple[str, ...]:
        """The sources that a method gets, in order: all models, without the base where it is more than a model."""
        listed = tuple(source.reference for source in self.models)
        if method.base == "ignored":
            return listed
        return tuple(reference for reference in listed if reference != self.base_model)

    @property
    def reference(self) -> str:
        """The model whose order of units the others are put in: the one named, else the base, else the first."""
        named = self.align.reference if self.align is not None else None
        return named or self.base_model or self.models[0].reference

    def data_of(self, reference: str) -> tuple[Data, ...]:
        """The calibration data of a model: its own, or all where it has none of its own."""
        if self.calibration is None:
            return ()
        at = self.positions.get(reference)
        own = None if at is None else self.models[at].data
        return self.calibration.named(() if own is None else (own,))

    def rule_for(self, name: str, part: Part, usage: Usage | None = None) -> Rule | None:
        """The first rule that matches a tensor."""
        rule = next((rule for rule in self.rules if rule.where.matches(name, part)), None)
        if usage is not None:
            usage.saw(name)
            if rule is not None:
                usage.chose(rule)
        return rule

    def parameters_for(
        self, method: Method, name: str, depth: float, sources: Sequence[str], rule: Rule | None = None
    ) -> Resolved:
        """The method's parameters for one tensor.

        Args:
            method: the method of the tensor's rule.
            name: the tensor's name, for filters.
            depth: where in the model it lies, from 0 to 1, for gradients.
            sources: the references of the sources that are merged, in order.
            rule: the rule for the tensor.
        """
        values: dict[str, Any] = {}
        problems: list[Problem] = []
        for parameter, declared in method.parameters.items():
            asked = sources if declared.per_source else (None,)
            found = [self._value(method, parameter, name, depth, source, rule) for source in asked]
            wrong = [item for item in found if isinstance(item, Problem)]
            if parameter not in self.reported:
                problems += wrong
            if not wrong:
                values[parameter] = tuple(found) if declared.per_source else found[0]
        arguments = {method.parameters[parameter].argument: value for parameter, value in values.items()}
        return Resolved(values, arguments, tuple(dict.fromkeys(problems)))

    def levels(self, source: str | None, rule: Rule | None) -> Iterable[Level]:
        """The mappings of parameters that speak about a source (None: about all at once), the first to ask first."""
        if rule is not None:
            if source is not None and source in rule.positions and rule.models:
                yield (*rule.path, "models", rule.positions[source], "parameters"), rule.models[source]
            yield (*rule.path, "parameters"), rule.parameters or {}
        if source is not None and source in self.positions:
            at = self.positions[source]
            yield ("models", at, "parameters"), self.models[at].parameters
        yield ("parameters",), self.parameters

    def _value(
        self, method: Method, parameter: str, name: str, depth: float, source: str | None, rule: Rule | None
    ) -> Scalar | Problem:
        declared = method.parameters[parameter]
        place: Path = ()
        for path, settings in self.levels(source, rule):
            if parameter not in settings:
                continue
            place = (*path, parameter)
            value = evaluate(settings[parameter], name, depth)
            if value is UNSET:
                continue
            try:
                return declared.check(value)  # type: ignore[no-any-return]
            except ValueError as error:
                return Problem(f"`{parameter}` {error}", self.where(*place), declared.advice(value))
        if not declared.required:
            return declared.default  # type: ignore[no-any-return]
        whose = f" for {source}" if source is not None else ""
        fix = "add an entry without `filter`" if place else f"add `{parameter}: …` under `parameters`"
        what = f"`{method.name}` needs `{parameter}`{whose}, which nothing sets"
        return Problem(what, self.where(*(place or ("merge_method",))), fix)

    def canonical(self) -> dict[str, Any]:
        """What the recipe means, as stable plain data for digests: without its text, folder and output."""
        left_out = {"text", "folder", "tree", "output", "reported"}
        stages = {"calibration", "align", "correct", "train", "evaluate", "report"}
        return {
            item.name: _plain(value)
            for item in dataclasses.fields(self)
            if item.name not in left_out
            and ((value := getattr(self, item.name)) is not None or item.name not in stages)
        }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        if isinstance(value, Condition):
            del found["path"]  # where it is written is not what it means
        elif isinstance(value, Source) and value.data is None:
            del found["data"]
        return found
    if isinstance(value, Mapping):
        return {name: _plain(value[name]) for name in sorted(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
