"""From the facts of a run to the sections of its report, kept as plain data until the output is complete."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mergetool.execute.correct_report import SPREAD
from mergetool.execute.fact_folder import Facts
from mergetool.execute.prepared import Prepared
from mergetool.execute.report.alignment import alignment_section
from mergetool.execute.report.corrections import spread_section
from mergetool.execute.report.depth import depth_of
from mergetool.execute.report.draw import disk_failed, said
from mergetool.execute.report.likeness import likeness_section
from mergetool.execute.report.soup import soup_section
from mergetool.execute.report.statistics import fisher_section, inputs_section
from mergetool.plan import Plan
from mergetool.plan.stages import CHOSEN, merged, scored, wanted
from mergetool.publish.privacy import Privacy
from mergetool.publish.sections import Section

Pairs = Mapping[tuple[int, int], Facts]


def gather(plan: Plan, made: Prepared, pairs: Pairs, failed: Callable[[str], None]) -> tuple[Section, ...]:
    """Everything that there is to see of what was made ahead of the jobs.

    No section may cost the merge: one that cannot be made is left out, and a note says why.

    Args:
        plan: the plan.
        made: what was turned, measured and trained.
        pairs: how alike every two models are, by their places in the plan.
        failed: is told why a section is missing.

    Raises:
        RunError: the disk is full or fails.
    """
    names = Privacy.of(plan).names
    name_of = [names[source.label] for source in plan.sources]
    parts = plan.sources[plan.lender].anatomy.parts
    depth = depth_of(parts)
    found: list[Section | None] = []
    if pairs:
        with _surely("cka", failed):
            found.append(likeness_section({(name_of[i], name_of[j]): facts for (i, j), facts in pairs.items()}))
    if made.aligned:
        with _surely("alignment", failed):
            aligned = {name_of[i]: each for i, each in made.aligned.items()}
            found.append(alignment_section(aligned, names[plan.recipe.reference], depth))
    measured = {kind: _of_kind(made, kind, name_of) for kind in ("gram", "squared_gradients")}
    if measured["gram"]:
        with _surely("inputs", failed):
            found.append(inputs_section(measured["gram"], parts, depth))
    if measured["squared_gradients"]:
        floors = {job.name: float(job.parameters.get("floor", 0.0)) for job in plan.jobs}
        with _surely("fisher", failed):
            found.append(fisher_section(measured["squared_gradients"], floors, parts, depth))
    if made.trained is not None and made.coefficients is not None:
        with _surely("training", failed):
            found += _trained(plan, made, made.trained, name_of)
    if made.soup is not None:
        with _surely("soup", failed):
            own = next(merged(job) for job in plan.jobs if CHOSEN in wanted(job).values())
            data = [each.name for each in scored(plan.recipe)]
            found.append(soup_section(made.soup, [name_of[i] for i in own], data))
    if made.corrections:
        with _surely("spread", failed):
            kept = (json.loads((facts.path / SPREAD).read_bytes()) for facts in made.corrections)
            found.append(spread_section([each for records in kept for each in records]))
    return tuple(section for section in found if section is not None)


def _of_kind(made: Prepared, kind: str, name_of: list[str]) -> dict[str, Facts]:
    return {name_of[source]: facts for (each, source), facts in made.measured.items() if each == kind}


def _trained(plan: Plan, made: Prepared, trained: Path, name_of: list[str]) -> Iterator[Section]:
    from mergetool.execute.report.training import coefficients_section, training_section
    from mergetool.execute.train.product import ABOUT

    assert made.coefficients is not None
    labels = [source.label for source in plan.sources]
    job = next(job for job in plan.jobs if job.name in made.coefficients.values and job.reads)
    sources = [name_of[i] for i in merged(job)]
    base = plan.recipe.base_model
    yield training_section(json.loads((trained / ABOUT).read_bytes()), sources)
    depth = depth_of(plan.sources[plan.lender].anatomy.parts)
    yield coefficients_section(made.coefficients, sources, None if base is None else name_of[labels.index(base)], depth)


@contextlib.contextmanager
def _surely(section: str, failed: Callable[[str], None]) -> Iterator[None]:
    """Go on without a section, whatever is wrong with it, but for a disk that fails."""
    try:
        yield
    except Exception as error:  # nothing that is only to be looked at is worth a merge
        if disk_failed(error):
            raise
        failed(f"the report lacks the section `{section}`: {said(error)}")
