"""A turned model checked: it is run beside its own original, a layer in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergetool.anatomy import Group, Turning, anatomy
from mergetool.errors import NonFinite, Problem, RunError
from mergetool.execute.calibration import Samples
from mergetool.execute.forward.arrays import Arrays, Get, getter
from mergetool.execute.forward.model import Model, open_model
from mergetool.execute.forward.passes import CannotStream, Step, streamed, whole
from mergetool.execute.forward.rows import Batch
from mergetool.execute.forward.skeleton import Network
from mergetool.execute.forward.watch import Seen, Watch
from mergetool.execute.forward.weights import Weights
from mergetool.execute.turned import verify

Array = NDArray[Any]
ROWS = 2
"""Samples that a model is checked on."""
TOKENS = 24
"""Tokens of a text that it is checked on, at most."""
_ROUTED = 0.5
"""The share of tokens that may differ where there are routers: those that follow one sent elsewhere see it."""


def random_batches(config: Mapping[str, Any], seed: int = 0) -> list[Batch]:
    """Random tokens, or random images, that a model of this config can be run on; none where that is not known."""
    random = torch.Generator().manual_seed(seed)
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(text, Mapping)  # see the line before
    size = text.get("vocab_size")
    if isinstance(size, int):
        most = text.get("max_position_embeddings", text.get("n_positions"))
        length = min(TOKENS, most) if isinstance(most, int) else TOKENS
        ids = torch.randint(0, size, (ROWS, length), generator=random)
        decoder = {"decoder_input_ids": ids} if config.get("is_encoder_decoder") else {}
        return [{"input_ids": ids, **decoder}]
    side = config.get("image_size")
    if isinstance(side, int):
        return [{"pixel_values": torch.randn(ROWS, config.get("num_channels", 3), side, side, generator=random)}]
    return []


def few(samples: Sequence[Samples]) -> list[Batch]:
    """The beginning of some samples: enough to check a model on."""
    found: list[Batch] = []
    for each in samples[:1]:
        first = next(iter(each.batches(ROWS)), None)
        if first is None:
            continue
        text = each.padding is not None
        found.append({name: x[:ROWS, :TOKENS] if text else x[:ROWS] for name, x in first.items()})
    return found


def check(
    config: Mapping[str, Any],
    weights: Weights,
    label: str,
    groups: Sequence[Group],
    turning: Turning,
    batches: Sequence[Batch],
    folder: Path,
    network: Network | None = None,
    device: str = "cpu",
) -> float:
    """Run a model and the same model turned, and compare what they put out.

    Where the residual stream is turned and the model has no head, its own outputs are turned: then they are compared
    with their channels in order of size.

    Args:
        config: the model's ``config.json``.
        weights: its own weights.
        label: the model, for messages.
        groups: all that may change places.
        turning: what does.
        batches: the keyword inputs of each forward pass.
        folder: where activations are kept meanwhile.
        network: makes the network of a model that transformers does not know.
        device: where the model is run.

    Returns:
        The largest difference of two outputs.

    Raises:
        RunError: the turned model is another function.
        NonFinite: the model's own outputs or weights are not finite.
        CheckpointError: there is no such network.
        PlanError: the data does not suit the model.
    """
    stream = next((group.size for group in groups if group.kind == "residual"), None)

    def outputs(get: Get) -> list[Array]:
        model = open_model(config, Arrays(weights.shapes, get), label, network, device)
        found = _outputs(model, batches, folder)
        if stream is None or model.head is not None:
            return found
        return [np.sort(each, axis=-1) if each.shape[-1:] == (stream,) else each for each in found]

    try:
        routed = any(part.role == "router" for part in anatomy(config, weights.shapes).parts.values())
        return verify(outputs, getter(weights, label), turning, excused=_ROUTED if routed else 0.0)
    except NonFinite:
        raise
    except RunError as error:
        raise RunError(Problem(p.what, p.where or label, p.fix) for p in error.problems) from error


def _outputs(model: Model, batches: Sequence[Batch], folder: Path) -> list[Array]:
    """What a model puts out: its head's predictions, or all it makes."""
    try:
        return _run(model, streamed(model, batches, Watch(model), folder), len(batches))
    except CannotStream:
        return _run(model, whole(model, batches, Watch(model)), len(batches))


def _run(model: Model, steps: Iterator[Step], batches: int) -> list[Array]:
    found: list[Array] = []
    with contextlib.closing(steps):  # type: ignore[type-var]  # it is a generator
        for step in steps:
            for i in range(batches):
                with _caught(model, found):
                    step.run(i, _nobody)
    return found


def _nobody(seen: Seen) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def _caught(model: Model, found: list[Array]) -> Iterator[None]:
    """Catch the outputs of a pass that comes to its end; those before stop at their block."""

    def at_head(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        model.load(model.head_groups)
        with torch.no_grad():
            # Not through the module's own call, whose hooks stop the pass here.
            found.extend(_arrays(module.forward(*args)))

    def at_end(module: torch.nn.Module, args: Any, output: Any) -> None:
        found.extend(_arrays(output))

    if model.head is not None:
        hook = model.head.register_forward_pre_hook(at_head, prepend=True)
    else:
        hook = model.module.register_forward_hook(at_end)
    try:
        yield
    finally:
        hook.remove()


def _arrays(output: Any) -> list[Array]:
    """The floating tensors of an output, in their order."""
    if isinstance(output, torch.Tensor):
        return [output.detach().float().cpu().numpy()] if output.is_floating_point() else []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [array for item in items for array in _arrays(item)]
