"""How well a network predicts labelled data: its loss or its accuracy, over all predictions of all batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch

from mergetool.errors import PlanError
from mergetool.execute.forward.gradients import IGNORED, predicted, predicts_next, targeted
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.rows import Batch
from mergetool.publish.loadable import first_line

Metric = Literal["loss", "accuracy"]
_SUMMED = 1 << 22  # logits turned into float64 at once


def score(model: Model, batches: Iterable[Batch], metric: Metric = "loss") -> float:
    """The mean over all predictions: nats, or the share that is right.

    A causal language model predicts the tokens that ``labels`` names, any other network a class for each label. The
    whole network must be loaded.

    Args:
        model: the network.
        batches: keyword inputs with ``labels``; those of -100 do not count.
        metric: what is measured.

    Raises:
        NonFinite: a prediction holds a NaN or an infinity.
        PlanError: the network cannot be run on the data, or their labels do not suit what it predicts.
    """
    sums: list[float] = []
    predictions = 0
    with torch.inference_mode():
        for batch in batches:
            there = {key: value.to(model.device) for key, value in batch.items()}
            logits = predicted(model, there)
            _refuse_misfits(model, logits, there)
            logits, targets = targeted(model, logits, there, "data")
            predictions += int((targets != IGNORED).sum())
            sums += _sums(model, logits, targets, metric)
    if not predictions:
        raise PlanError("the data has nothing to predict", model.label, "give longer texts, or texts with responses")
    return math.fsum(sums) / predictions


def _refuse_misfits(model: Model, logits: torch.Tensor, batch: Batch) -> None:
    if logits.ndim == 3 and predicts_next(model.module) and "input_ids" in batch:
        return
    labels = batch["labels"]
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        what = f"predicts {list(logits.shape)} and the labels are {list(labels.shape)} of {labels.dtype}".replace(
            "torch.", ""
        )
        fix = "texts score causal language models; for others read the data with an `adapter`, a class for each sample"
        raise PlanError(what, model.label, fix)


def _sums(model: Model, logits: torch.Tensor, targets: torch.Tensor, metric: Metric) -> list[float]:
    """What a batch adds, a run of predictions after the other."""
    step = max(1, _SUMMED // logits.shape[-1])
    found = []
    for some, theirs in zip(logits.split(step), targets.split(step), strict=True):
        try:
            if metric == "accuracy":
                found.append(float((some.argmax(-1) == theirs).sum()))
                continue
            kept = some.double()
            loss = torch.nn.functional.cross_entropy(kept, theirs, ignore_index=IGNORED, reduction="sum")
            found.append(float(loss))
        except (IndexError, RuntimeError, ValueError) as error:
            what = f"the labels do not suit its {logits.shape[-1]} classes: {first_line(error)}"
            raise PlanError(what, model.label, "give labels from 0 on") from error
    return found
