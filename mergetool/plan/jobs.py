"""One job for each output tensor, and for each source tensor where it goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mergetool.checkpoint.checkpoint import TensorRef
from mergetool.errors import MissingTensor, PlanError, Problem, RecipeError, ShapeMismatch
from mergetool.kernels.rounding import READABLE, WRITABLE
from mergetool.methods import METHODS
from mergetool.methods.declare import Cut, Method
from mergetool.plan.faults import TENSOR, TENSORS, Faults, listed
from mergetool.plan.passes import multiplies, passes
from mergetool.plan.sources import place, references
from mergetool.plan.work import Fate, Job, Read, Route, Source
from mergetool.recipe import Recipe, Rule, Usage
from mergetool.storage.dtypes import DType, dtype


class JobMaker:
    """Makes the jobs of a recipe for its opened sources; what is wrong is left in ``faults``."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source], lender: int, faults: Faults) -> None:
        self.recipe = recipe
        self.sources = sources
        self.lender = lender
        self.faults = faults
        self.usage = Usage(recipe)
        self.index = {source.label: i for i, source in enumerate(sources)}
        self.merging = frozenset(self.index[label] for label in recipe.sources if label in self.index)
        self.complete = len(sources) == len(references(recipe))
        self.routes: list[Route] = []
        self._routed: set[tuple[int, str]] = set()
        self._missing: dict[int, list[str]] = defaultdict(list)
        self._untied: dict[int, list[str]] = defaultdict(list)

    def make(self) -> tuple[Job, ...]:
        """Go through the output's tensors in the order in which the lender stores them."""
        jobs = [job for name in self._names() if (job := self._job(name)) is not None]
        self._report()
        return self._with_facts(jobs)

    def _names(self) -> Iterator[str]:
        """The output's names: the lender's, then what only others have; a tied name is stored once."""
        lender = self.sources[self.lender]
        seen = set()
        for i in (self.lender, *sorted(self.merging - {self.lender})):
            for name in self.sources[i].checkpoint.tensors:
                if name not in lender.anatomy.tied and name not in seen:
                    seen.add(name)
                    yield name
        for name, holder in lender.anatomy.tied.items():
            for i in sorted(self.merging | {self.lender}):
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
        holders = [i for i in (self.lender, *range(len(self.sources))) if name in self.sources[i].checkpoint.tensors]
        part = self.sources[holders[0]].anatomy.parts[name]
        rule = self.recipe.rule_for(name, part, self.usage)
        if rule is not None and rule.drop:
            for i in sorted(set(holders)):
                self._route(i, name, "dropped", rule.title)
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
            what = f"{rule.title} keeps of {self.sources[source].label} what it does not have: {TENSORS}"
            self.faults.of_tensor(RecipeError, Problem(what, self.recipe.where(*rule.path, "keep")), bare.name)
            return None
        for i in sorted(self.merging | {source}):
            if bare.name in self.sources[i].checkpoint.tensors:
                self._route(i, bare.name, "copied" if i == source else "replaced", rule.title)
        return self._copy(bare, read, rule.title)

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
        reason = rule.title if rule is not None else ""
        if method.reach == "matrix" and not multiplies(bare.part, present[0].tensor.shape):
            reason = reason or f"{method.name} solves what multiplies inputs"
            method, parameters = METHODS["linear"], {"weight": parameters["weight"], "normalize": True}
        stored = self._stored(bare, present[0].tensor)
        return replace(
            bare, shape=present[0].tensor.shape, dtype=stored, method=method.name, reads=tuple(present),
            parameters=parameters, reason=reason,
        )  # fmt: skip

    def _not_numbers(self, bare: Job) -> Job:
        """Integers, booleans and such: the lender's, the others' expected to be equal."""
        order = [self.lender, *sorted(self.merging - {self.lender})]
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
            what = f"{odd[0].tensor.dtype.name} only in {self.sources[odd[0].source].label}: {TENSORS}"
            self.faults.of_tensor(PlanError, Problem(what, self._place(odd[0]), _RULE_ADVICE), bare.name)
        elif len(shapes) > 1:
            said = ", ".join(f"{list(read.tensor.shape)} in {self.sources[read.source].label}" for read in reads)
            fix = _RULE_ADVICE
            axis = bare.part.vocabulary_axis
            if axis is not None and len({shape[axis : axis + 1] for shape in shapes}) > 1:
                fix = f"the vocabularies differ; merge models that share a tokenizer, or {fix}"
            other = next(read for read in reads if read.tensor.shape != reads[0].tensor.shape)
            problem = Problem(f"the shapes of {TENSORS} differ", self._place(other), fix)
            self.faults.of_tensor(ShapeMismatch, problem, bare.name, said)
        return not odd and len(shapes) == 1

    def _place(self, read: Read) -> str:
        return place(self.recipe, self.sources[read.source].label)

    def _stored(self, bare: Job, first: TensorRef) -> DType:
        """The dtype asked for; else, and for parts that suffer from rounding, the lender's own."""
        lender = self.sources[self.lender].checkpoint.tensors.get(bare.name, first).dtype
        own = lender if lender.name in READABLE else first.dtype
        asked = self.recipe.stored_dtype
        stored = own if asked is None or bare.part.keep_dtype else dtype(asked)
        if stored.name not in WRITABLE:
            what = f"a merge cannot be stored in {stored.name}, the dtype of {TENSORS}"
            problem = Problem(what, self.recipe.where("merge_method"), "set `out_dtype: bfloat16`")
            self.faults.of_tensor(PlanError, problem, bare.name)
        return stored

    def _parameters(
        self, bare: Job, method: Method, labels: Sequence[str], rule: Rule | None
    ) -> dict[str, object] | None:
        resolved = self.recipe.parameters_for(method, bare.name, bare.part.depth, labels, rule)
        if len(resolved.values) < len(method.parameters):
            for problem in resolved.problems:
                told = Problem(f"{problem.what} (for {TENSORS})", problem.where, problem.fix)
                self.faults.of_tensor(RecipeError, told, bare.name)
            return None
        clashes = method.check(resolved.arguments) if self.complete else []
        for argument, message in clashes:
            parameter = argument.rstrip("_")
            if parameter not in self.recipe.reported:
                problem = Problem(f"{message} (for {TENSORS})", self._where(parameter, rule))
                self.faults.of_tensor(RecipeError, problem, bare.name)
        return None if clashes else dict(resolved.values)

    def _where(self, parameter: str, rule: Rule | None) -> str:
        """Where a parameter is set first, from the rule outwards."""
        for source in (*(model.reference for model in self.recipe.models), None):
            for path, settings in self.recipe.levels(source, rule):
                if parameter in settings:
                    return self.recipe.where(*path, parameter)
        return self.recipe.where("merge_method")

    def _report(self) -> None:
        """Turn what was noted tensor by tensor into one problem for each source."""
        types = self._model_types() if self._missing else {}
        if len(types) > 1:
            self._report_types(types)
        for i, names in self._missing.items() if len(types) < 2 else ():
            what = f"{self.sources[i].label} lacks {TENSORS}"
            problem = Problem(what, place(self.recipe, self.sources[i].label), _RULE_ADVICE)
            for name in names:
                self.faults.of_tensor(MissingTensor, problem, name)
        for i, names in self._untied.items():
            lender = self.sources[self.lender].label
            what = f"{self.sources[i].label} has a {listed(names)} of its own, which {lender} ties to its embedding"
            fix = f"name {self.sources[i].label} as `base_model` to keep it untied, or drop it by a rule"
            self.faults.add(PlanError, [Problem(what, place(self.recipe, self.sources[i].label), fix)])
        for path in self.usage.filters_unused():
            self.faults.add(RecipeError, [Problem("this filter matches no tensor", self.recipe.where(*path))])
        for path in self.usage.rules_unused() if self.complete else ():
            what = "this rule matches no tensor that an earlier rule leaves"
            self.faults.add(RecipeError, [Problem(what, self.recipe.where(*path, "where"))])

    def _model_types(self) -> dict[str, list[int]]:
        """The merging sources by the model type that their configs name."""
        types: dict[str, list[int]] = {}
        for i in sorted(self.merging, key=lambda i: (i != self.lender, i)):
            if (named := self.sources[i].checkpoint.config.get("model_type")) is not None:
                types.setdefault(str(named), []).append(i)
        return types

    def _report_types(self, types: dict[str, list[int]]) -> None:
        """Say of models that lack each other's tensors that they are no models of one kind."""
        said = [f"{name} ({', '.join(self.sources[i].label for i in found)})" for name, found in types.items()]
        what = f"{', '.join(said[:-1])} and {said[-1]} are different architectures"
        lacking, names = next(iter(self._missing.items()))
        fix = f"merge models of one architecture; {self.sources[lacking].label} lacks {listed(names)}"
        odd = next(reversed(types.values()))[0]
        self.faults.add(PlanError, [Problem(what, place(self.recipe, self.sources[odd].label), fix)])

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
            job = replace(job, facts=tuple(facts))
            marked.append(replace(job, passes=passes(job)))
        return tuple(marked)


_RULE_ADVICE = f"add a rule: `- where: {{name: {TENSOR}}}` with `keep: <source>` or `drop: true`"
