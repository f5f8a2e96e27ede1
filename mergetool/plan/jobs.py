"""One job for each output tensor, and for each source tensor where it goes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mergetool.checkpoint.checkpoint import TensorRef
from mergetool.errors import MissingTensor, PlanError, Problem, RecipeError, ShapeMismatch
from mergetool.kernels.rounding import READABLE, WRITABLE
from mergetool.methods import METHODS
from mergetool.methods.declare import Cut, Method
from mergetool.plan.faults import Faults, listed
from mergetool.plan.sources import place, references
from mergetool.plan.work import Fate, Job, Read, Route, Source
from mergetool.recipe import Recipe, Rule, Usage
from mergetool.storage.dtypes import DType, dtype


class JobMaker:
    """Makes the jobs of a recipe for its opened sources; what is wrong is left in ``faults``."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source], donor: int, faults: Faults) -> None:
        self.recipe = recipe
        self.sources = sources
        self.donor = donor
        self.faults = faults
        self.usage = Usage(recipe)
        self.index = {source.label: i for i, source in enumerate(sources)}
        self.merging = frozenset(self.index[label] for label in recipe.sources if label in self.index)
        self.complete = len(sources) == len(references(recipe))
        self.routes: list[Route] = []
        self._routed: set[tuple[int, str]] = set()
        self._missing: dict[int, list[str]] = defaultdict(list)
        self._untied: dict[int, list[str]] = defaultdict(list)
        self._settings_checked: set[object] = set()

    def make(self) -> tuple[Job, ...]:
        """Go through the output's tensors in the order in which the donor stores them."""
        jobs = [job for name in self._names() if (job := self._job(name)) is not None]
        self._report()
        return self._with_facts(jobs)

    def _names(self) -> Iterator[str]:
        """The output's names: the donor's, then what only others have; a tied name is stored once."""
        donor = self.sources[self.donor]
        seen = set()
        for i in (self.donor, *sorted(self.merging - {self.donor})):
            for name in self.sources[i].checkpoint.tensors:
                if name not in donor.anatomy.tied and name not in seen:
                    seen.add(name)
                    yield name
        for name, holder in donor.anatomy.tied.items():
            for i in sorted(self.merging | {self.donor}):
                if name not in self.sources[i].checkpoint.tensors:
                    continue
                ties = self.sources[i].anatomy.tied
                if name in ties or ties.get(holder) == name:
                    self._route(i, name, "tied", holder)
                else:
                    self._untied[i].append(name)

    def _route(self, source: int, tensor: str, fate: Fate, by: str) -> None:
        """Note where a tensor goes; the first word counts, for a tied weight may be read for both of its names."""
        if (source, tensor) not in self._routed:
            self._routed.add((source, tensor))
            self.routes.append(Route(source, tensor, fate, by))

    def _find(self, source: int, name: str) -> Read | None:
        """A source's tensor of this name; where the source ties it to another, that other."""
        held = self.sources[source]
        found = held.checkpoint.tensors.get(name)
        if found is None and name in held.anatomy.tied:
            found = held.checkpoint.tensors.get(held.anatomy.tied[name])
        return Read(source, found) if found is not None else None

    def _job(self, name: str) -> Job | None:
        holders = [i for i in (self.donor, *range(len(self.sources))) if name in self.sources[i].checkpoint.tensors]
        part = self.sources[holders[0]].anatomy.parts[name]
        rule = self.recipe.rule_for(name, part, self.usage)
        if rule is not None and rule.drop:
            for i in sorted(set(holders)):
                self._route(i, name, "dropped", f"rule {rule.index}")
            return None
        bare = Job(name, (), dtype("F32"), part, "", ())
        if rule is not None and rule.keep is not None:
            # A model that could not be opened is reported as such, and nothing of it can be kept.
            return self._kept(bare, rule, self.index[rule.keep]) if rule.keep in self.index else None
        return self._merged(bare, rule)

    def _kept(self, bare: Job, rule: Rule, source: int) -> Job | None:
        """A job that takes one source's tensor as it is."""
        read = self._find(source, bare.name)
        if read is None:
            what = f"rule {rule.index} keeps `{bare.name}` of {self.sources[source].label}, which has no such tensor"
            self.faults.add(RecipeError, [Problem(what, self.recipe.where(*rule.path, "keep"))])
            return None
        for i in sorted(self.merging | {source}):
            if bare.name in self.sources[i].checkpoint.tensors:
                self._route(i, bare.name, "copied" if i == source else "replaced", f"rule {rule.index}")
        return self._copy(bare, read, f"rule {rule.index}")

    def _copy(self, bare: Job, read: Read, reason: str, compare: tuple[Read, ...] = ()) -> Job:
        """Floating numbers pass through, so that they are checked and get the dtype asked for; others are bytes."""
        ref = read.tensor
        if ref.dtype.name in READABLE and not compare:
            stored = self._stored(bare, ref)
            return replace(
                bare, shape=ref.shape, dtype=stored, method="passthrough", reads=(read,),
                parameters={"scale": (1.0,)}, reason=reason,
            )  # fmt: skip
        return replace(bare, shape=ref.shape, dtype=ref.dtype, reads=(read,), compare=compare, reason=reason)

    def _merged(self, bare: Job, rule: Rule | None) -> Job | None:
        method = self.recipe.method(rule)
        merged = [self.index[label] for label in self.recipe.merged_by(method) if label in self.index]
        base = [self.index[self.recipe.base_model]] if method.base == "required" and self.recipe.base_model else []
        wanted = [*base, *merged]
        reads = [self._find(i, bare.name) for i in wanted]
        present = [read for read in reads if read is not None]
        every = present or [read for i in range(len(self.sources)) if (read := self._find(i, bare.name))]
        if all(read.tensor.dtype.name not in READABLE for read in every):
            return self._not_numbers(bare)
        if len(present) < len(wanted):
            for i, read in zip(wanted, reads, strict=True):
                if read is None:
                    self._missing[i].append(bare.name)
            return None
        for read in present:
            self._route(read.source, read.tensor.name, "merged", bare.name)
        if not self._alike(bare, present):
            return None
        parameters = self._parameters(bare, method, [self.sources[i].label for i in merged], rule)
        if parameters is None:
            return None
        reason = f"rule {rule.index}" if rule is not None else ""
        stored = self._stored(bare, present[0].tensor)
        return replace(
            bare, shape=present[0].tensor.shape, dtype=stored, method=method.name, reads=tuple(present),
            parameters=parameters, reason=reason,
        )  # fmt: skip

    def _not_numbers(self, bare: Job) -> Job:
        """Integers, booleans and such: the donor's, the others' expected to be equal."""
        order = [self.donor, *sorted(self.merging - {self.donor})]
        first, *others = [read for i in order if (read := self._find(i, bare.name)) is not None]
        self._route(first.source, first.tensor.name, "copied", "holds no floating numbers")
        for read in others:
            self._route(read.source, read.tensor.name, "compared", "holds no floating numbers")
        return self._copy(bare, first, "holds no floating numbers", tuple(others))

    def _alike(self, bare: Job, reads: Sequence[Read]) -> bool:
        """Whether the sources' tensors can be merged: equal shapes, floating dtypes."""
        odd = [read for read in reads if read.tensor.dtype.name not in READABLE]
        shapes = {read.tensor.shape for read in reads}
        if odd:
            what = f"`{bare.name}` is {odd[0].tensor.dtype.name} in {self.sources[odd[0].source].label} only"
            self.faults.add(PlanError, [Problem(what, self._place(odd[0]), _rule_advice(bare.name))])
        elif len(shapes) > 1:
            said = ", ".join(f"{list(read.tensor.shape)} in {self.sources[read.source].label}" for read in reads)
            fix = _rule_advice(bare.name)
            if bare.part.vocabulary_axis is not None:
                fix = f"the vocabularies differ; merge models that share a tokenizer, or {fix}"
            other = next(read for read in reads if read.tensor.shape != reads[0].tensor.shape)
            what = f"the shapes of `{bare.name}` differ: {said}"
            self.faults.add(ShapeMismatch, [Problem(what, self._place(other), fix)])
        return not odd and len(shapes) == 1

    def _place(self, read: Read) -> str:
        return place(self.recipe, self.sources[read.source].label)

    def _stored(self, bare: Job, first: TensorRef) -> DType:
        """The dtype asked for; else, and for parts that suffer from rounding, the donor's own."""
        donor = self.sources[self.donor].checkpoint.tensors.get(bare.name, first).dtype
        own = donor if donor.name in READABLE else first.dtype
        asked = self.recipe.stored_dtype
        stored = own if asked is None or bare.part.keep_dtype else dtype(asked)
        if stored.name not in WRITABLE:
            what = f"`{bare.name}` is {stored.name}, which a merge cannot be stored in"
            self.faults.add(PlanError, [Problem(what, self.recipe.where("merge_method"), "set `out_dtype: bfloat16`")])
        return stored

    def _parameters(
        self, bare: Job, method: Method, labels: Sequence[str], rule: Rule | None
    ) -> dict[str, object] | None:
        resolved = self.recipe.parameters_for(method, bare.name, bare.part.depth, labels, rule)
        problems = list(resolved.problems)
        key = (method.name, rule and rule.index, repr(resolved.values))
        if not problems and self.complete and key not in self._settings_checked:
            self._settings_checked.add(key)
            for parameter, message in method.check(resolved.arguments):
                problems.append(Problem(f"{message} (for `{bare.name}`)", self._where(parameter, rule)))
        self.faults.add(RecipeError, problems)
        return None if problems else dict(resolved.values)

    def _where(self, parameter: str, rule: Rule | None) -> str:
        """Where a parameter is set first, from the rule outwards."""
        for source in (*(model.reference for model in self.recipe.models), None):
            for path, settings in self.recipe.levels(source, rule):
                if parameter in settings:
                    return self.recipe.where(*path, parameter)
        return self.recipe.where("merge_method")

    def _report(self) -> None:
        """Turn what was noted tensor by tensor into one problem for each source."""
        for i, names in self._missing.items():
            what = f"{self.sources[i].label} lacks {listed(names)}"
            where = place(self.recipe, self.sources[i].label)
            self.faults.add(MissingTensor, [Problem(what, where, _rule_advice(names[0]))])
        for i, names in self._untied.items():
            donor = self.sources[self.donor].label
            what = f"{self.sources[i].label} has a {listed(names)} of its own, which {donor} ties to its embedding"
            fix = f"name {self.sources[i].label} as `base_model` to keep it untied, or drop it by a rule"
            self.faults.add(PlanError, [Problem(what, place(self.recipe, self.sources[i].label), fix)])
        for path in self.usage.filters_unused():
            self.faults.add(RecipeError, [Problem("this filter matches no tensor", self.recipe.where(*path))])
        for path in self.usage.rules_unused() if self.complete else ():
            what = "this rule matches no tensor that an earlier rule leaves"
            self.faults.add(RecipeError, [Problem(what, self.recipe.where(*path, "where"))])

    def _with_facts(self, jobs: list[Job]) -> tuple[Job, ...]:
        """Mark the measures whose scope is the model; their densities must not change from tensor to tensor."""
        densities: dict[tuple[str, str], object] = {}
        marked = []
        for job in jobs:
            facts = []
            for name, measure in METHODS[job.method].measures.items() if job.method else ():
                if isinstance(measure, Cut) and job.parameters[measure.scope] == "model":
                    facts.append(name)
                    density = job.parameters[measure.density]
                    if densities.setdefault((job.method, name), density) != density:
                        what = "with `scope: model` there is one density for each source, not one for each tensor"
                        self.faults.add(RecipeError, [Problem(what, self.recipe.where("parameters", "density"))])
            marked.append(replace(job, facts=tuple(facts)))
        return tuple(marked)


def _rule_advice(name: str) -> str:
    return f"add a rule: `- where: {{name: {name}}}` with `keep: <source>` or `drop: true`"


def elements(jobs: Sequence[Job]) -> int:
    """How many parameters the jobs make."""
    return sum(math.prod(job.shape) for job in jobs)
