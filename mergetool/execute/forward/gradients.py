"""Gradients of the loss, sample by sample; each parameter's is handed on and let go as soon as it is known.

The loss of a sample is the sum of the nats of its predictions. With labels sampled from the model's own predictions
the squared gradients estimate the diagonal of the Fisher information; with the data's labels, or the next tokens of
a text, they are the empirical kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mergetool.errors import NonFinite, PlanError
from mergetool.execute.forward.model import Model
from mergetool.execute.forward.names import Group
from mergetool.execute.forward.rows import Batch
from mergetool.publish.loadable import first_line

Labels = Literal["sampled", "data"]
IGNORED = -100
"""The label of a place that predicts nothing, as everywhere in transformers."""


@dataclass(frozen=True)
class Gradient:
    """What one sample says of one tensor.

    Attributes:
        name: the tensor on disk.
        weight: the tensor, in its shape on disk.
        gradient: the derivative of the sample's summed loss by it.
        predictions: how many predictions the sum is over.
    """

    name: str
    weight: torch.Tensor
    gradient: torch.Tensor
    predictions: int


def backward(
    model: Model, batch: Batch, told: Callable[[Gradient], None], labels: Labels = "sampled", seed: int = 0
) -> int:
    """Go through the samples of a batch one by one and tell every tensor's gradient; how many samples counted.

    The whole network must be loaded with gradients. Of a tied weight the gradient is that of all its uses.

    Args:
        model: the network.
        batch: keyword inputs; ``labels`` among them, if there are any, are for ``data``.
        told: is given each gradient; it may keep nothing of it but what it makes of it.
        labels: the model's own, ``sampled`` from its predictions, or those of the ``data``.
        seed: what labels are sampled with; a batch of its own needs a seed of its own.

    Raises:
        NonFinite: a gradient holds a NaN or an infinity.
        PlanError: the network predicts nothing, or cannot be run on the data.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(next(iter(batch.values())))
    counted = 0
    for i in range(size):
        sample = {key: value[i : i + 1].to(model.device) for key, value in batch.items()}
        loss, predictions = _loss(model, sample, labels, generator)
        if predictions:
            counted += 1
            with _consumed(model, told, predictions):
                loss.backward()
    return counted


def _loss(model: Model, sample: Batch, labels: Labels, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """The summed nats of a sample's predictions, and how many these are."""
    logits = predicted(model, sample)
    logits, targets = targeted(model, logits, sample, labels, generator)
    loss = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum())


def predicted(model: Model, batch: Batch) -> torch.Tensor:
    """The logits of a batch that lies where the model is.

    Raises:
        NonFinite: they hold a NaN or an infinity.
        PlanError: the network predicts nothing, or cannot be run on the data.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    try:
        made = model.module(**inputs)
    except Exception as error:  # whatever the network's code makes of inputs that do not suit it
        what = f"cannot be run on this data ({', '.join(inputs)}): {first_line(error)}"
        raise PlanError(what, model.label, "check that the data suits the model") from error
    logits = made if isinstance(made, torch.Tensor) else getattr(made, "logits", None)
    if logits is None:
        what = f"{type(model.module).__name__} predicts nothing, so it has no loss"
        raise PlanError(what, model.label, "use the model with its head, or a method that asks for no predictions")
    if not bool(logits.isfinite().all()):
        raise NonFinite(
            "what the network predicts holds a NaN or an infinity",
            model.label,
            "nothing was recorded; try other calibration data, or leave this model out",
        )
    return logits


def targeted(
    model: Model, logits: torch.Tensor, sample: Batch, labels: Labels, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[predictions, classes]`` and a label for each; the generator is for ``sampled`` ones."""
    causal = logits.ndim == 3 and predicts_next(model.module)
    stated = sample.get("labels")
    mask = sample.get("attention_mask")
    if labels == "data" and stated is None:
        if not causal:
            raise PlanError("the data has no labels", model.label, "give labels, or sample them from the model")
        stated = sample["input_ids"]
        stated = stated if mask is None else stated.masked_fill(mask == 0, IGNORED)
    if logits.ndim == 2:
        places = torch.zeros(1, dtype=torch.long, device=logits.device)
        known = stated.reshape(-1) if stated is not None else places
    else:
        known = stated if stated is not None else logits.new_zeros(logits.shape[:2], dtype=torch.long)
        if labels == "sampled" and mask is not None and mask.shape == known.shape:
            known = known.masked_fill(mask == 0, IGNORED)
        if causal:  # what stands at a place is predicted at the one before it
            logits, known = logits[:, :-1], known[:, 1:]
        logits, known = logits.flatten(0, 1), known.flatten()
    if labels == "sampled":
        chances = torch.softmax(logits.detach().float(), -1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
        known = torch.where(known == IGNORED, known, drawn)
    return logits, known


def predicts_next(module: torch.nn.Module) -> bool:
    """Whether a network is a causal language model, which predicts the next token at each place."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return False
    from transformers import AutoModelForCausalLM

    known: Any = AutoModelForCausalLM._model_mapping.get(type(config), ())
    kinds = known if isinstance(known, tuple) else (known,)
    return any(isinstance(module, kind) for kind in kinds if isinstance(kind, type))


@contextlib.contextmanager
def _consumed(model: Model, told: Callable[[Gradient], None], predictions: int) -> Iterator[None]:
    """Hand on each gradient when it is complete and let it go; of tensors that lie apart, when all are there."""
    waiting: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def hook(name: str, group: Group) -> Callable[[torch.Tensor], None]:
        def after(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None  # the hook runs when there is one
            parameter.grad = None
            found = waiting.setdefault(group.parameters, {})
            found[name] = gradient
            if len(found) == len(group.parameters):
                _tell(model, group, waiting.pop(group.parameters), told, predictions)

        return after

    with contextlib.ExitStack() as held:
        for group in model.groups:
            for name in group.parameters:
                if model.has_parameter(name) and model.parameter(name).requires_grad:
                    parameter = model.parameter(name)
                    handle = parameter.register_post_accumulate_grad_hook(hook(name, group))
                    held.callback(handle.remove)
        yield


def _tell(
    model: Model,
    group: Group,
    gradients: Mapping[str, torch.Tensor],
    told: Callable[[Gradient], None],
    predictions: int,
) -> None:
    for name, gradient in gradients.items():
        if not bool(gradient.isfinite().all()):
            raise NonFinite(
                "the gradient holds a NaN or an infinity",
                f"{model.label}: {group.names[0]} ({name} in the network)",
                "nothing was recorded; try other calibration data, or leave this model out",
            )
    with torch.no_grad():
        weights = {name: model.parameter(name).detach() for name in gradients}
        on_disk = group.undo(weights, model.module)
        for name, gradient in group.undo(gradients, model.module).items():
            told(Gradient(name, on_disk[name], gradient, predictions))
