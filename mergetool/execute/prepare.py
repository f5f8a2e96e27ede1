"""All that is done ahead of the jobs: sources turned, measured, trained and tried, each product a folder of facts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.execute.fact_folder import Facts
from mergetool.execute.prepared import Prepared
from mergetool.execute.progress import Progress, Quiet
from mergetool.plan import Plan
from mergetool.plan.correction import in_weights, uncorrected
from mergetool.plan.stages import CHOSEN, GRAM, TRAINED, measured, merged, sequential, wanted
from mergetool.plan.tasks import several

if TYPE_CHECKING:
    from mergetool.execute.aligned import Aligned
    from mergetool.execute.prepare_data import SourceData
    from mergetool.execute.prepare_models import Sources


def prepare(
    plan: Plan,
    *,
    trust_code: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    root: Path | None = None,
) -> Prepared:
    """Make everything that a plan's jobs must know of whole models, or find what was made before.

    What is kept is called by what it was made from: the sources' files and order, the data, the settings. So a second
    call finds it, and one that was killed is gone on with.

    Args:
        plan: the plan.
        trust_code: whether the recipe's adapter may be run.
        device: where models are run; several with commas between, if one may be dealt out to them.
        progress: is told how many bytes of weights are done.
        root: where folders of facts are kept; the cache by default.

    Raises:
        PlanError: data cannot be read, hold too little or do not suit the models, or the adapter may not be run.
        CheckpointError: a model cannot be read or run, or has no tokenizer.
        NonFinite: a weight, an activation, a gradient or a loss is not finite.
        OutputRefused: ``root`` cannot be written.
        RunError: the disk is full or fails.
    """
    kinds = {kind for job in plan.jobs for kind in wanted(job).values()}
    corrected = plan.correction is not None and not several(plan)
    if plan.recipe.align is None and not kinds and not corrected:
        return Prepared(plan)
    from mergetool.execute.prepare_data import SourceData, adapter_of
    from mergetool.execute.prepare_models import Sources

    shown = progress or Quiet()
    sources, notes = Sources(plan, device=device), tuple[str, ...]()
    found: Mapping[int, Aligned] = {}
    if plan.recipe.align is not None:
        from mergetool.execute.align import alignment

        aligned = alignment(plan, trust_code=trust_code, device=device, progress=shown, root=root)
        found = aligned.sources
        moved = {i: each for i, each in found.items() if each.moved}
        orders = {i: each.facts.path.name for i, each in moved.items()}
        sources, notes = Sources(plan, {i: aligned[i] for i in moved}, orders, device=device), aligned.notes
    if not kinds and not corrected:
        return Prepared(plan, sources.turnings, aligned=found, notes=notes)
    adapter = adapter_of(plan, trust_code)
    sources = Sources(plan, sources.turnings, sources.orders, adapter, device)
    data = SourceData(plan, adapter)
    merge = replace(sources, plan=uncorrected(plan))
    known = replace(_facts(merge, data, notes, shown, root), plan=plan, aligned=found)
    return _corrected(sources, data, known, shown, root) if corrected else known


def _facts(
    sources: Sources, data: SourceData, notes: tuple[str, ...], progress: Progress, root: Path | None
) -> Prepared:
    """Measure, train and try out, for sources that are in their order."""
    from mergetool.execute.prepare_training import train_all

    found_of: dict[tuple[str, int], Facts] = {}
    turned: set[str] = set()
    for (kind, source), names in _measures(sources.plan).items():
        found_of[kind, source], found = _record(sources, data, kind, source, sorted(names), progress, root)
        turned |= found
    jobs = [job for job in sources.plan.jobs if TRAINED in wanted(job).values()]
    coefficients, trained = None, None
    if jobs:
        coefficients, trained, more = train_all(sources, data, jobs, progress, root)
        notes = (*notes, *more)
    known = Prepared(
        sources.plan,
        sources.turnings,
        found_of,
        coefficients=coefficients,
        trained=trained,
        transposed=frozenset(turned),
    )
    if sequential(sources.plan.jobs):
        from mergetool.execute.prepare_sequence import measure_in_sequence

        known = measure_in_sequence(sources, data, known, progress, root)
    if any(CHOSEN in wanted(job).values() for job in sources.plan.jobs):
        from mergetool.execute.prepare_soup import choose

        known, more = choose(sources, data, known, progress, root)
        notes = (*notes, *more)
    # What no pass went through is of no account to a method that goes without, but in a note.
    said = (f"{facts.label}: {note}" for facts in known.measured.values() for note in facts.notes)
    return replace(known, notes=tuple(dict.fromkeys((*notes, *data.notes, *said))))


def _corrected(sources: Sources, data: SourceData, known: Prepared, progress: Progress, root: Path | None) -> Prepared:
    """Put the merged model right: in its weights, or in files beside them."""
    from mergetool.execute.correct import correct

    found = correct(sources, data, known, progress, root)
    said = dict.fromkeys((*known.notes, *data.notes, *(note for each in found for note in each.notes)))
    known = replace(known, corrections=tuple(each.facts for each in found), notes=tuple(said))
    if in_weights(sources.plan.recipe):
        return replace(known, edits=found[0].edits)
    from mergetool.execute.correct_beside import beside

    return replace(known, beside=beside(sources, found))


def _measures(plan: Plan) -> Mapping[tuple[str, int], set[str]]:
    """What is to be measured: for each kind and source the names of the tensors."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    later = {GRAM} if sequential(plan.jobs) else set()
    for job in plan.jobs:
        first = len(job.reads) - len(merged(job))
        for read in job.reads[first:]:
            for kind in {*measured(job)} - later:
                found[kind, read.source].add(read.tensor.name)
    return dict(sorted(found.items()))


def _record(
    sources: Sources,
    data: SourceData,
    kind: str,
    source: int,
    names: list[str],
    progress: Progress,
    root: Path | None,
) -> tuple[Facts, frozenset[str]]:
    """One statistic of one source on its own data, and which of its tensors are stored the other way round."""
    from mergetool.execute.prepare_models import transposed
    from mergetool.execute.record import record

    samples = data.of(source, labels=kind != "gram")
    with sources.weights(source) as weights:
        model = sources.model(source, weights)
        facts = record(
            model,
            [batch for each in samples for batch in each.batches()],
            [kind],
            made_of={"model": sources.made_of(source), "data": [each.digest for each in samples]},
            names=names,
            strict=False,
            seed=sources.plan.recipe.seed,
            root=root,
            progress=progress,
        )
        return facts, transposed(model)
