"""How often a job goes over its sources, told from what its method declares."""

from __future__ import annotations

from mergetool.facts import magnitude
from mergetool.methods import METHODS
from mergetool.methods.declare import Cut
from mergetool.plan.work import Job

CUT = 2
"""Finding a cut looks at a small sample, counts in one pass, and gathers in another; rarely it counts again."""


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
