"""Facts of gradients: squares and sensitivities, summed over samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergetool.errors import PlanError
from mergetool.execute.fact_folder import Facts
from mergetool.execute.fact_making import Making
from mergetool.execute.forward.gradients import Gradient, Labels, backward
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.passes import WHOLE
from mergetool.execute.forward.rows import Batch
from mergetool.execute.forward.spread import loaded
from mergetool.execute.progress import Progress
from mergetool.facts.statistics import SENSITIVITY, State, Statistic
from mergetool.plan.faults import listed

if TYPE_CHECKING:
    from numpy.typing import NDArray


def record_gradients(
    model: Model,
    batches: Sequence[Batch],
    statistics: Sequence[Statistic],
    names: Mapping[str, Collection[str] | None],
    labels: Labels,
    seed: int,
    found: Making,
    progress: Progress,
    strict: bool,
) -> Facts:
    """Measure gradients of a model, with all its weights in memory; see :func:`~mergetool.execute.record.record`."""
    states: dict[str, dict[str, State]] = {each.name: {} for each in statistics}
    samples = 0

    def told(seen: Gradient) -> None:
        for each in statistics:
            known, asked = states[each.name], names[each.name]
            if asked is not None and seen.name not in asked:
                continue
            if each is SENSITIVITY:
                state = known.setdefault(seen.name, each.empty((), seen.gradient.device))
                each.accumulate(state, seen.weight, seen.gradient / seen.predictions)
            else:
                if seen.name not in known:
                    known[seen.name] = each.empty(tuple(seen.gradient.shape), seen.gradient.device)
                each.accumulate(known[seen.name], seen.gradient)

    progress.start(model.nbytes(model.groups), f"measure {model.label}")
    try:
        with loaded(model, gradients=True):
            for i, batch in enumerate(batches):
                samples += backward(model, batch, told, labels, seed=seed * 1_000_003 + i)
                progress.advance(model.nbytes(model.groups) // len(batches))
    finally:
        progress.close()
    for each in statistics:
        if strict and (unseen := sorted(set(names[each.name] or ()) - states[each.name].keys())):
            raise PlanError(f"{listed(unseen)} got no gradient", model.label, "leave them out")
    facts: dict[str, NDArray[Any]] = {}
    for each in statistics:
        for name, state in sorted(states[each.name].items()):
            state["count"].fill_(samples)  # a sample that a tensor took no part in has a gradient of 0 there
            for field, value in each.finish(state).items():
                facts[f"{name}:{field}"] = value.cpu().numpy()
    found.add(WHOLE, facts, {}, states[statistics[0].name])
    return found.finish()
