"""Experts that share one stacked parameter: no modules of their own, but every product with a slice is seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mergetool.execute.forward.places import Place
from mergetool.execute.forward.rows import Tokens

Tell = Callable[[Any, Any, int], None]
"""Takes an input, an output or both, and the number of the expert."""
_PRODUCTS = {"linear", "matmul", "__matmul__", "mm"}


@contextlib.contextmanager
def only_tokens(module: torch.nn.Module, path: str, tokens: Tokens) -> Iterator[None]:
    """Let padding pass by the experts of a module, so that what they are given are tokens only."""
    state: list[tuple[torch.Tensor, torch.Size]] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        x = args[0] if args else next(iter(kwargs.values()))
        kept = tokens.kept(x, path)
        if kept is None:
            return None
        state.append((kept, x.shape))
        return tuple(_only(value, kept) for value in args), {k: _only(value, kept) for k, value in kwargs.items()}

    def after(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not state:
            return None
        kept, shape = state.pop()
        whole = output.new_zeros(len(kept), output.shape[-1])
        whole[kept] = output.reshape(-1, output.shape[-1])
        return whole.reshape(*shape[:-1], output.shape[-1])

    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _only(value: Any, kept: torch.Tensor) -> Any:
    """Of a tensor with an entry for each token those that are kept."""
    if not isinstance(value, torch.Tensor):
        return value
    if len(value) == len(kept):
        return value[kept]
    return value.flatten(0, 1)[kept][None] if value.shape[:2].numel() == len(kept) else value


class Slices(TorchFunctionMode):  # type: ignore[misc]  # torch's types are not read
    """Sees products with one expert's slice of a stacked parameter."""

    def __init__(self, stacks: list[tuple[Place, Tell]]) -> None:
        super().__init__()
        self._places = stacks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1 and getattr(args[1], "ndim", 0) == 2:
            for place, tell in self._places:
                expert = _expert(place, args[1])
                if expert is not None:
                    tell(args[0], output, expert)
        return output


def _expert(place: Place, matrix: torch.Tensor) -> int | None:
    """Which slice of a stacked parameter a matrix is; None if it is no whole slice."""
    stack = place.module._parameters[place.attribute]
    assert stack is not None  # it was found there
    if matrix.numel() * len(stack) != stack.numel():
        return None
    distance = matrix.data_ptr() - stack.data_ptr()
    expert, inside = divmod(distance, stack.stride(0) * stack.element_size())
    return expert if inside == 0 and 0 <= expert < len(stack) else None
