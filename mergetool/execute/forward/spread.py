"""A network with all its weights in memory: on one device, or its blocks dealt out to several by accelerate's hooks.

What is outside the blocks stays on the first device, so that nothing meets that is not in one place: inputs, masks and
predictions are there. Each block gets its arguments moved to where it lies. Blocks are dealt out in their order, so
that activations change the device as often as there are devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mergetool.errors import PlanError

if TYPE_CHECKING:
    import torch

    from mergetool.execute.forward.model import Model


@contextlib.contextmanager
def loaded(model: Model, gradients: bool = False) -> Iterator[None]:
    """Have all weights in memory for a while.

    Args:
        model: the network.
        gradients: whether gradients are wanted.

    Raises:
        PlanError: it is to run on several devices, and accelerate is not installed.
        NonFinite: a weight holds a NaN or an infinity.
        CheckpointError: a weight cannot be read, or does not fit.
    """
    with _spread(model):
        try:
            model.load(model.groups, gradients=gradients)
            yield
        finally:
            model.free(model.groups)


def layout(model: Model) -> dict[str, torch.device]:
    """Where each block goes, by its path: about the same bytes on every device, in the order of the network."""
    sizes = [model.nbytes(model.groups_in(block)) for block in model.blocks]
    before = model.nbytes(model.groups_in(None))  # on the first device
    share = (before + sum(sizes)) / len(model.devices)
    found = {}
    for block, size in zip(model.blocks, sizes, strict=True):
        # A block goes where its middle falls.
        at = min(int((before + size / 2) / share), len(model.devices) - 1) if share else 0
        found[block.path] = model.devices[at]
        before += size
    return found


@contextlib.contextmanager
def _spread(model: Model) -> Iterator[None]:
    """Deal out the blocks for a while, if there is more than one device to have them."""
    if len(model.devices) == 1 or not model.blocks:
        yield
        return
    try:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module
    except ImportError:
        fix = "install it: `pip install 'mergetool[gpus]'`, or give one device"
        raise PlanError("a model that runs on several devices needs accelerate", "--device", fix) from None
    model.layout = layout(model)
    blocks = {block.path: block.module for block in model.blocks}
    outside = {
        path: module
        for path, module in model.module.named_modules()
        if model.is_outside(path) and (module._parameters or module._buffers)
    }
    try:
        for path, module in {**outside, **blocks}.items():
            device = model.layout.get(path, model.device)
            add_hook_to_module(module, _arguments_to(device))
            for part in module.modules() if path in blocks else ():
                _move(part, device)
        yield
    finally:
        for path, module in {**outside, **blocks}.items():
            remove_hook_from_module(module)
            for part in module.modules() if path in blocks else ():
                _move(part, model.device)
        model.layout = {}


def _arguments_to(device: torch.device) -> Any:
    """A hook that moves what a module is given; where its parameters lie is not its business."""
    from accelerate.hooks import AlignDevicesHook

    hook = AlignDevicesHook(execution_device=device)
    hook.init_hook = lambda module: module
    return hook


def _move(module: torch.nn.Module, device: torch.device) -> None:
    """Move the buffers of a module; its parameters go where they belong when they are loaded."""
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.to(device)
