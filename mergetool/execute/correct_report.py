"""What a correction came to: how far the spread of activations had collapsed, and how far it is put right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.anatomy import Part
from mergetool.execute.correct_steps import CORRECTED, INPUT_SHIFT, MERGED
from mergetool.facts.correction import Moments, spread_ratio
from mergetool.facts.outputs import Output
from mergetool.plan.columns import plural

SPREAD = "spread.json"
"""The file beside the facts of a correction that says of each output how its spread compares with its goal's."""


@dataclass(frozen=True)
class Spread:
    """The spread of one output's units as a share of what it should be, the mean over units that move."""

    output: str
    """The weight that makes it, or the head that reads it."""
    layer: int | None
    role: str
    task: str | None
    before: float
    """In the merged model as it is; 1 where no variance has collapsed."""
    after: float


def after(outputs: Sequence[Output], arrays: Mapping[str, NDArray[Any]]) -> dict[str, Moments]:
    """The moments of outputs in the end; of what a head reads, by how the head corrects it.

    Args:
        outputs: what was to be corrected; what no pass went through is left out.
        arrays: the facts of the correction.
    """
    found = {}
    for output in outputs:
        name = output.weight
        if output.read and f"{name}:scale" in arrays:
            scale, shift = arrays[f"{name}:scale"], arrays[f"{name}:{INPUT_SHIFT}"]
            mean, std = (arrays[f"{name}:{fact}"] for fact in MERGED)
            found[name] = Moments(scale * mean + shift, scale * std)
        elif f"{name}:{CORRECTED[0]}" in arrays:
            mean, std = (arrays[f"{name}:{fact}"] for fact in CORRECTED)
            found[name] = Moments(mean, std)
    return found


def spreads(
    task: str,
    parts: Mapping[str, Part],
    targets: Mapping[str, Moments],
    merged: Mapping[str, Moments],
    corrected: Mapping[str, Moments],
) -> Iterator[Spread]:
    """Each output that is known before and after, in order."""
    for name, part in parts.items():
        if name in targets and name in merged and name in corrected:
            ratios = (spread_ratio(targets[name], each[name]) for each in (merged, corrected))
            yield Spread(name, part.layer, part.role, task or None, *ratios)


def summary(task: str, spread: Sequence[Spread]) -> Iterator[str]:
    """The spread in a sentence."""
    if not spread:
        return
    least = min(spread, key=lambda each: each.before)
    before, now = (float(np.mean([getattr(each, when) for each in spread])) for when in ("before", "after"))
    yield (
        f"{f'{task}: ' if task else ''}activations had {before:.3f} of the spread they should have, "
        f"{least.before:.3f} at the least ({least.output}), and have {now:.3f} corrected"
    )


def clamped(outputs: Iterable[Output], arrays: Mapping[str, NDArray[Any]], clamp: float) -> Iterator[str]:
    """That some units would need more than they are allowed."""
    scales = [arrays[key] for output in outputs if (key := f"{output.weight}:scale") in arrays]
    units = sum(map(len, scales))
    held = sum(int(np.count_nonzero((scale >= clamp) | (scale <= 1.0 / clamp))) for scale in scales)
    if held and clamp > 1.0:
        yield f"{held:,} of {plural(units, 'unit')} would need a factor beyond `clamp`, {clamp:g}"
