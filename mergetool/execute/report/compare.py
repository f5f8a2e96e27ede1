"""Every two models of a plan run side by side, and how alike what they compute is: facts that only a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergetool.execute.fact_folder import Facts
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.watch import Watch
from mergetool.execute.prepare_data import SourceData, adapter_of
from mergetool.execute.prepare_models import Sources
from mergetool.execute.progress import Progress
from mergetool.execute.record import record_pair
from mergetool.plan import Plan
from mergetool.plan.stages import compared
from mergetool.recipe.data import Report


def compare(
    plan: Plan, *, trust_code: bool, device: str, progress: Progress, root: Path | None
) -> Mapping[tuple[int, int], Facts]:
    """Measure the CKA of every pair that the plan's stage ``compare`` names, or find what was measured before.

    The models are run as they lie: CKA is blind to the order of units.

    Args:
        plan: the plan.
        trust_code: whether the recipe's adapter may be run.
        device: where models are run.
        progress: is told how many bytes of weights are done.
        root: where folders of facts are kept; the cache by default.

    Returns:
        The facts by the places of both models in the plan's sources; nothing where the plan has no such stage.

    Raises:
        MergetoolError: the data or the models cannot be read or run, or not alike.
    """
    if all(stage.name != "compare" for stage in plan.stages):
        return {}
    recipe = plan.recipe
    settings = recipe.report or Report()
    adapter = adapter_of(plan, trust_code)
    sources = Sources(plan, adapter=adapter, device=device)
    pairs = compared(recipe, plan.sources)
    together = sorted({i for pair in pairs for i in pair})
    samples = SourceData(plan, adapter).shared(together, settings.data, settings.samples)
    batches = [batch for each in samples for batch in each.batches()]
    digests = [each.digest for each in samples]
    found: dict[tuple[int, int], Facts] = {}
    for first, second in pairs:
        with sources.weights(first) as one, sources.weights(second) as other:
            models = sources.model(first, one), sources.model(second, other)
            found[first, second] = record_pair(
                *models,
                batches,
                "cka",
                made_of={"first": sources.made_of(first), "second": sources.made_of(second), "data": digests},
                outputs=_outputs(models[0]),
                root=root,
                progress=progress,
            )
    return found


def _outputs(model: Model) -> list[str]:
    """What is compared: the outputs of all layers, or of a network without any those of its matrices."""
    if model.blocks:
        return [block.name for block in model.blocks]
    return [place.names[0][0] for place in Watch(model).places if place.has_input and place.kind != "stack"]
