"""The stages of a plan: what is turned, measured and trained ahead of the merge, and what each of them costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from mergetool.errors import Problem
from mergetool.methods import METHODS
from mergetool.plan.passes import CUT
from mergetool.plan.work import Job, Memory, Source, Stage
from mergetool.recipe import Recipe
from mergetool.recipe.data import Data, Train

TRAINED = "coefficients"
"""The kind of fact that is trained; all others are measured."""
_GRADIENTS = "squared_gradients"


def wanted(job: Job) -> Mapping[str, str]:
    """What a job's method must know of the models besides their tensors: argument → kind of fact."""
    found: Mapping[str, str] = getattr(METHODS[job.method], "facts", {}) if job.method else {}
    return found


def merged(job: Job) -> tuple[int, ...]:
    """The sources that a job merges, the base left out, as places in the plan's."""
    first = int(bool(job.method) and METHODS[job.method].base == "required")
    return tuple(read.source for read in job.reads[first:])


def unsupported(recipe: Recipe) -> list[Problem]:
    """The stages that a recipe asks for and no run makes."""
    if recipe.correct is None:
        return []
    return [Problem("`correct` is a stage that mergetool does not run yet", recipe.where("correct"), "remove it")]


def unmet(recipe: Recipe, jobs: Sequence[Job]) -> Iterator[Problem]:
    """What the methods need and the recipe does not give, or the other way round."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for job in jobs:
        kinds[job.method].update(wanted(job).values())
    if recipe.train is not None and not any(TRAINED in found for found in kinds.values()):
        what = f"`train` says how coefficients are trained, and `{recipe.merge_method}` trains none"
        able = [name for name, method in METHODS.items() if TRAINED in getattr(method, "facts", {}).values()]
        fix = f"remove it, or use `merge_method: {able[0]}`" if able else "remove it"
        yield Problem(what, recipe.where("train"), fix)
    for name in sorted(name for name, found in kinds.items() if found and recipe.calibration is None):
        what = f"`{name}` runs the models on data, and the recipe has no `calibration`"
        yield Problem(what, _place(recipe, name), "add `calibration: {data: {NAME: FILE}}`")


def _place(recipe: Recipe, method: str) -> str:
    """Where a recipe names a method."""
    rules = (rule for rule in recipe.rules if rule.merge_method == method)
    path = () if recipe.merge_method == method else next((rule.path for rule in rules), ())
    return recipe.where(*path, "merge_method")


def stages(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job], memory: Memory) -> tuple[Stage, ...]:
    """All stages of a plan in the order in which they run."""
    cut = tuple(i for i, job in enumerate(jobs) if job.facts)
    most = max((1 if memory.holds(job) else job.passes for job in jobs), default=1)
    return (
        *_align(recipe, sources, jobs),
        *_measures(recipe, sources, jobs),
        *_train(recipe, sources, jobs),
        *((Stage("measure", cut, CUT),) if cut else ()),
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
    held = 2 * max((_layer(sources[i]) for i in every), default=0)
    yield Stage("align", places, 1, tokens, sum(_weights(sources[i]) for i in every), held)


def _measures(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job]) -> Iterator[Stage]:
    """The measurements on data, one for each kind of fact; every model on its own data."""
    for kind in dict.fromkeys(kind for job in jobs for kind in wanted(job).values() if kind != TRAINED):
        places = tuple(i for i, job in enumerate(jobs) if kind in wanted(job).values())
        every = sorted({source for i in places for source in merged(jobs[i])})
        tokens = sum(_tokens(recipe.data_of(sources[i].label)) for i in every)
        # Gradients need all weights at once, one gradient and the sums in float64; inputs a layer and its matrices.
        held = max((_floats(sources[i]) * 3 if kind == _GRADIENTS else _grams(sources[i]) for i in every), default=0)
        yield Stage("measure", places, 1, tokens, sum(_weights(sources[i]) for i in every), held)


def _train(recipe: Recipe, sources: Sequence[Source], jobs: Sequence[Job]) -> Iterator[Stage]:
    """The training of coefficients: every step merges all weights, and reads them again for the gradients."""
    places = tuple(i for i, job in enumerate(jobs) if TRAINED in wanted(job).values())
    if not places:
        return
    settings = recipe.train or Train()
    every = sorted({read.source for i in places for read in jobs[i].reads})
    # Beside the merged model a tensor of the base and of a source, the gradient, and what one is read from.
    held = max(_floats(sources[i]) + 7 * _largest(sources[i]) // 2 for i in every)
    nbytes = 2 * settings.steps * sum(_weights(sources[i]) for i in every)
    yield Stage("train", places, settings.steps, settings.steps * settings.batch_tokens, nbytes, held)


def _tokens(data: Iterable[Data]) -> int:
    """The most tokens that samples can have."""
    return sum(each.samples * each.max_length for each in data)


def _weights(source: Source) -> int:
    """Bytes of a model on disk."""
    return sum(tensor.nbytes for tensor in source.checkpoint.tensors.values())


def _floats(source: Source) -> int:
    """Bytes of a model in float32."""
    return sum(4 * tensor.size for tensor in source.checkpoint.tensors.values())


def _largest(source: Source) -> int:
    """Bytes of a model's largest tensor in float32."""
    return max((4 * tensor.size for tensor in source.checkpoint.tensors.values()), default=0)


def _layer(source: Source) -> int:
    """Bytes in float32 of a model's largest layer, or of what lies outside all layers."""
    return max(map(_sized, _layers(source)), default=0)


def _grams(source: Source) -> int:
    """Bytes of a layer in float32 with a Gram matrix for each of its matrices, in float64 and in float32."""
    return max(
        (_sized(layer) + sum(12 * prod(s[:-2]) * s[-1] ** 2 for s in layer if len(s) > 1) for layer in _blocks(source)),
        default=_layer(source),
    )


def _sized(layer: Iterable[tuple[int, ...]]) -> int:
    return sum(4 * prod(shape) for shape in layer)


def _layers(source: Source) -> list[list[tuple[int, ...]]]:
    """The shapes of the tensors of each layer, those outside all layers together."""
    return [*_blocks(source), [s for key, s in _shapes(source) if key[1] is None]]


def _blocks(source: Source) -> list[list[tuple[int, ...]]]:
    found: dict[tuple[str | None, int | None], list[tuple[int, ...]]] = defaultdict(list)
    for key, shape in _shapes(source):
        if key[1] is not None:
            found[key].append(shape)
    return list(found.values())


def _shapes(source: Source) -> Iterator[tuple[tuple[str | None, int | None], tuple[int, ...]]]:
    for name, tensor in source.checkpoint.tensors.items():
        part = source.anatomy.parts[name]
        yield (part.stack, part.layer), tensor.shape
