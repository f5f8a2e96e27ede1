"""The stages of a plan: what is turned, measured, trained and tried ahead of the merge, and what each costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from mergetool.errors import Problem
from mergetool.facts.dam import GRANULARITIES
from mergetool.facts.soup import evaluations, reads
from mergetool.methods import METHODS
from mergetool.plan.passes import CUT
from mergetool.plan.sizes import SMALL, coefficients, floats, grams, largest, layer, matched, weights
from mergetool.plan.work import Correction, Job, Memory, Source, Stage
from mergetool.recipe import Recipe
from mergetool.recipe.data import Data, Report, Train

TRAINED = "coefficients"
"""The kind of fact that is trained."""
GRAM = "gram"
"""The kind of fact that may be measured while layers are merged."""
CHOSEN = "soup"
"""The kind of fact that is found by trying merged models."""
_GRADIENTS = "squared_gradients"
CHEAP = 2_000_000_000
"""Bytes of weights that may be read to compare the models although nobody asked for it."""


def wanted(job: Job) -> Mapping[str, str]:
    """What a job's method must know of the models besides their tensors: argument → kind of fact."""
    found: Mapping[str, str] = getattr(METHODS[job.method], "facts", {}) if job.method else {}
    return found


def measured(job: Job) -> tuple[str, ...]:
    """The kinds of facts that are measured for a job, each source on its own data."""
    return tuple(kind for kind in dict.fromkeys(wanted(job).values()) if kind not in (TRAINED, CHOSEN))


def sequential(jobs: Iterable[Job]) -> bool:
    """Whether the inputs of layers are measured as the merged layers before them make them."""
    return any(job.parameters.get("sequential") is True for job in jobs if GRAM in measured(job))


def merged(job: Job) -> tuple[int, ...]:
    """The sources that a job merges, the base left out, as places in the plan's."""
    first = int(bool(job.method) and METHODS[job.method].base == "required")
    return tuple(read.source for read in job.reads[first:])


def unmet(recipe: Recipe, jobs: Sequence[Job]) -> Iterator[Problem]:
    """What the methods need and the recipe does not give, or the other way round."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for job in jobs:
        kinds[job.method].update(wanted(job).values())
    for key, kind, does, not_so in (
        ("train", TRAINED, "coefficients are trained", "trains none"),
        ("evaluate", CHOSEN, "merged models are tried out", "tries none"),
    ):
        if getattr(recipe, key) is None or any(kind in found for found in kinds.values()):
            continue
        able = [name for name, method in METHODS.items() if kind in getattr(method, "facts", {}).values()]
        fix = f"remove it, or use `merge_method: {able[0]}`" if able else "remove it"
        yield Problem(f"`{key}` says how {does}, and `{recipe.merge_method}` {not_so}", recipe.where(key), fix)
    yield from _sequence(recipe, jobs)
    for name in sorted(name for name, found in kinds.items() if found and recipe.calibration is None):
        what = f"`{name}` runs the models on data, and the recipe has no `calibration`"
        yield Problem(what, _place(recipe, name), "add `calibration: {data: {NAME: FILE}}`")


def _sequence(recipe: Recipe, jobs: Sequence[Job]) -> Iterator[Problem]:
    """What cannot be done while layers are merged one after the other."""
    if not sequential(jobs):
        return
    asking = [job for job in jobs if GRAM in measured(job)]
    where = recipe.where("parameters", "sequential")
    if odd := next((job for job in asking if job.parameters.get("sequential") is not True), None):
        first = next(job for job in asking if job.parameters.get("sequential") is True)
        what = f"`sequential` differs between `{first.name}` and `{odd.name}`, and layers are merged in one sequence"
        yield Problem(what, where, "give it one value")
    if any(CHOSEN in wanted(job).values() for job in jobs):
        what = "a soup is chosen by what the other tensors are, and with `sequential` these depend on the soup"
        yield Problem(what, where, "leave out `sequential`, or choose the soup in a recipe of its own")


def _place(recipe: Recipe, method: str) -> str:
    """Where a recipe names a method."""
    rules = (rule for rule in recipe.rules if rule.merge_method == method)
    path = () if recipe.merge_method == method else next((rule.path for rule in rules), ())
    return recipe.where(*path, "merge_method")


def stages(
    recipe: Recipe,
    sources: Sequence[Source],
    jobs: Sequence[Job],
    memory: Memory,
    correction: Correction | None = None,
) -> tuple[Stage, ...]:
    """All stages of a plan in the order in which they run."""
    cut = tuple(i for i, job in enumerate(jobs) if job.facts)
    most = max((1 if memory.holds(job) else job.passes for job in jobs), default=1)
    return (
        *_align(recipe, sources, jobs),
        *_measures(recipe, sources, jobs),
        *_train(recipe, sources, jobs),
        *_evaluate(recipe, sources, jobs),
        *_compare(recipe, sources, jobs),
        *((Stage("measure", cut, CUT),) if cut else ()),
        *_correct(sources, jobs, correction),
        Stage("merge", tuple(range(len(jobs))), most),
    )


def _align(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job]) -> Iterator[Stage]:
    """The matching of units; two models at a time, layer by layer."""
    if recipe.align is None:
        return
    places = tuple(i for i, job in enumerate(jobs) if job.method)
    every = {read.source for i in places for read in jobs[i].reads}
    tokens = 0
    if recipe.align.method == "activation_matching" and recipe.calibration is not None:
        tokens = len(every) * _tokens(recipe.calibration.named(recipe.align.data))
    held = max((matched(sources[i], recipe.align) for i in every), default=0)
    yield Stage("align", places, 1, tokens, sum(weights(sources[i]) for i in every), held)


def _measures(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job]) -> Iterator[Stage]:
    """The measurements on data, one for each kind of fact; every model on its own data."""
    for kind in dict.fromkeys(kind for job in jobs for kind in measured(job)):
        places = tuple(i for i, job in enumerate(jobs) if kind in measured(job))
        every = sorted({source for i in places for source in merged(jobs[i])})
        again = 1 + (kind == GRAM and sequential(jobs))  # each source's layer, then the merged one
        tokens = again * sum(_tokens(recipe.data_of(sources[i].label)) for i in every)
        # Gradients need all weights at once, one gradient and the sums in float64; inputs a layer and its matrices.
        held = max((floats(sources[i]) * 3 if kind == _GRADIENTS else grams(sources[i]) for i in every), default=0)
        nbytes = again * sum(weights(sources[i]) for i in every)
        yield Stage("measure", places, again, tokens, nbytes, held)


def _train(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job]) -> Iterator[Stage]:
    """The training of coefficients: every step merges all weights, and reads them again for the gradients."""
    places = tuple(i for i, job in enumerate(jobs) if TRAINED in wanted(job).values())
    if not places:
        return
    settings = recipe.train or Train()
    every = sorted({read.source for i in places for read in jobs[i].reads})
    # Beside the merged model a tensor of the base and of a source, the gradient, and what one is read from; and of the
    # coefficients themselves, their gradients, two moments and the best.
    held = max(floats(sources[i]) + 7 * largest(sources[i]) // 2 for i in every) + SMALL
    own, parameters = merged(jobs[places[0]]), jobs[places[0]].parameters
    granularity = parameters.get("granularity", GRANULARITIES[0])
    held += 5 * 4 * len(own) * max(coefficients(sources[i], granularity) for i in own)
    nbytes = 2 * settings.steps * sum(weights(sources[i]) for i in every)
    yield Stage("train", places, settings.steps, settings.steps * settings.batch_tokens, nbytes, held)


def _evaluate(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job]) -> Iterator[Stage]:
    """The choice of a soup: every average that is tried is made from its sources, held whole and run on the data."""
    places = tuple(i for i, job in enumerate(jobs) if CHOSEN in wanted(job).values())
    if not places:
        return
    own = merged(jobs[places[0]])
    tokens = _tokens(scored(recipe)) * evaluations(len(own))
    nbytes = reads(len(own)) * max(weights(sources[i]) for i in own)
    held = max(floats(sources[i]) for i in own) + 4 * max(job.size for job in jobs)
    yield Stage("evaluate", places, evaluations(len(own)), tokens, nbytes, held)


def scored(recipe: Recipe) -> tuple[Data, ...]:
    """The data that merged models are tried on."""
    names = () if recipe.evaluate is None else recipe.evaluate.data
    return () if recipe.calibration is None else recipe.calibration.named(names)


def compared(recipe: Recipe, sources: Sequence[Source]) -> tuple[tuple[int, int], ...]:
    """The pairs of models that a report compares: all whose weights are read, a base that is used among them."""
    places = {source.label: i for i, source in enumerate(sources)}
    return tuple(combinations((places[label] for label in dict.fromkeys(recipe.sources)), 2))


def _compare(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job]) -> Iterator[Stage]:
    """The comparison of every two models on the same data: where it is asked for, or cheap beside the other facts."""
    report, calibration = recipe.report or Report(), recipe.calibration
    pairs = compared(recipe, sources)
    if calibration is None or not pairs or not report.draw or report.cka is False:
        return
    nbytes = sum(weights(sources[i]) for pair in pairs for i in pair)
    if report.cka is None and not (_runs_models(recipe, jobs) and nbytes <= CHEAP):
        return
    places = tuple(i for i, job in enumerate(jobs) if job.method)
    some = (replace(data, samples=min(data.samples, report.samples)) for data in calibration.named(report.data))
    held = 2 * max(layer(sources[i]) for pair in pairs for i in pair)
    yield Stage("compare", places, len(pairs), 2 * len(pairs) * _tokens(some), nbytes, held)


def _runs_models(recipe: Recipe, jobs: Sequence[Job]) -> bool:
    """Whether the run looks at whole models anyway, and so has a report."""
    return recipe.align is not None or recipe.correct is not None or any(wanted(job) for job in jobs)


def _correct(sources: Sequence[Source], jobs: Sequence[Job], correction: Correction | None) -> Iterator[Stage]:
    """The corrections: what is aimed at, what the merged model has, and then layer by layer what each output needs.

    Each layer is run once for each step of it and once more; the merged weights are made three times.
    """
    if correction is None:
        return
    steps = Counter(output.step[:-1] for output in {each.step: each for each in correction.outputs.outputs}.values())
    runs = max(steps.values(), default=0) + len(correction.outputs.batch_norms) + 1
    names = {job.name for job in correction.jobs if job.corrected is not None}
    places = tuple(i for i, job in enumerate(jobs) if job.name in names)
    every = {read.source for job in correction.jobs if job.method for read in job.reads}
    tokens = nbytes = 0
    for task in correction.tasks:
        aimed = every if task.source is None else {task.source}
        tokens += (len(aimed) + 1 + runs) * _tokens(task.data)
        nbytes += sum(weights(sources[i]) for i in aimed) + 3 * sum(weights(sources[i]) for i in every)
    held = max((layer(sources[i]) for i in every), default=0)
    yield Stage("correct", places, runs, tokens, nbytes, held)


def _tokens(data: Iterable[Data]) -> int:
    """The most tokens that samples can have."""
    return sum(each.samples * each.max_length for each in data)
