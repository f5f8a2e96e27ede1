"""How a job goes over its sources and what it holds of them, told from what its method declares."""

from __future__ import annotations

from mergetool.anatomy import Part
from mergetool.facts import magnitude
from mergetool.facts.dam import kind_of
from mergetool.methods import METHODS
from mergetool.methods.declare import Cut
from mergetool.plan.work import Job

CUT = 2
"""Finding a cut looks at a small sample, counts in one pass, and gathers in another; rarely it counts again."""


def multiplies(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that inputs are multiplied by, or a stack of them."""
    if part.role == "other":  # a layer of a network that only an adapter knows, unless it is a convolution's kernel
        return len(shape) == 2
    return len(shape) >= 2 and kind_of(part) == "linear" and part.role != "embedding.patch"


def inputs(job: Job) -> int:
    """How many inputs the matrix of a job multiplies, at most: the longer of its axes, never the vocabulary's."""
    first = len(job.shape) - 2
    return max(size for axis, size in enumerate(job.shape) if axis >= first and axis != job.part.vocabulary_axis)


def passes(job: Job) -> int:
    """How often the merge goes over a job's sources if it cannot hold them: to measure, then once to combine."""
    if not job.method:
        return 1
    method = METHODS[job.method]
    named = {method.parameters[name].argument: value for name, value in job.parameters.items()}
    ahead = 0
    for name, measure in method.measures.items():
        if name in job.facts:  # known from the stage ahead
            continue
        if isinstance(measure, Cut):
            ahead += 0 if all(magnitude.trivial(density) for density in named[measure.density]) else CUT
        else:
            ahead += measure.needed(**named)
    return ahead + 1
