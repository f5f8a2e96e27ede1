"""What goes into and comes out of the modules that use chosen tensors, told while a network runs.

Nothing here knows an architecture. Leaf modules are hooked. Experts that share one stacked parameter are no modules;
there every product with a slice of the parameter is seen by a torch function mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mergetool.errors import NonFinite, PlanError, RunError
from mergetool.execute.forward.experts import Slices, Tell, only_tokens
from mergetool.execute.forward.model import Block, Model
from mergetool.execute.forward.places import Place, places
from mergetool.execute.forward.rows import Tokens, channels_last, patches
from mergetool.recipe.spelling import did_you_mean


@dataclass(frozen=True)
class Seen:
    """What a module was given or made in one batch.

    Attributes:
        name: the tensor on disk that the module uses, or the name of a block.
        side: ``input`` or ``output``.
        expert: which expert of a tensor that holds several; else None.
        rows: float32 ``[rows, channels]``, padding left out.
    """

    name: str
    side: str
    expert: int | None
    rows: torch.Tensor


Told = Callable[[Seen], None]


class Stop(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class Watch:
    """Chosen tensors of one model, and where their inputs and outputs can be seen.

    Args:
        model: the model.
        inputs: names on disk whose modules' inputs are wanted.
        outputs: names on disk whose modules' outputs are wanted, or names of blocks.

    Attributes:
        leaders: name on disk → the name under which its input is told, for tensors that share one input.
        seen: the names and sides that were told so far, leaders and the others.

    Raises:
        PlanError: a name is not that of a tensor whose inputs or outputs can be seen.
    """

    def __init__(self, model: Model, inputs: Collection[str] = (), outputs: Collection[str] = ()) -> None:
        self.model, self.inputs, self.outputs = model, frozenset(inputs), frozenset(outputs)
        self.places = places(model)
        self.leaders: dict[str, str] = {}
        self.seen: set[tuple[str, str]] = set()
        self._shared: dict[Any, tuple[torch.Tensor, str]] = {}
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        for wanted, known in (
            (self.inputs, {name for place in self.places if place.has_input for name in place.every}),
            (self.outputs, {name for place in self.places for name in place.every} | self._blocks),
        ):
            if unknown := sorted(wanted - known):
                what = "there is no module of this tensor's own whose activations could be seen"
                raise PlanError(what, f"{self.model.label}: {unknown[0]}", did_you_mean(unknown[0], known))

    @property
    def _blocks(self) -> set[str]:
        return {block.name for block in self.model.blocks}

    @contextlib.contextmanager
    def on(self, chosen: Callable[[str], bool], tokens: Tokens, told: Told, last: bool = False) -> Iterator[None]:
        """Watch one forward pass.

        Args:
            chosen: which modules to watch, by their path.
            tokens: which places of the batch count.
            told: is given everything that is seen, as it is seen.
            last: whether the pass may stop once its head has been reached, if the head's output is not wanted.
        """
        self._shared.clear()
        wanted = [p for p in self.places if chosen(p.path) and p.every & (self.inputs | self.outputs)]
        pending = {place.path for place in wanted}

        def noted(place: Place) -> Tell:
            tell = self._tell(place, tokens, told)

            def telling(x: Any, y: Any, expert: int) -> None:
                pending.discard(place.path)
                tell(x, y, expert)

            return telling

        with contextlib.ExitStack() as held:
            stacks = [(place, noted(place)) for place in wanted if place.kind == "stack"]
            for module, path in {place.module: place.path for place, _ in stacks}.items():
                held.enter_context(only_tokens(module, path, tokens))
            for place in wanted:
                if place.kind != "stack":
                    self._hook(place, noted(place), held)
            for block in self.model.blocks:
                if chosen(block.path) and block.name in self.outputs:
                    hook = partial(self._after_block, block, tokens, told)
                    held.callback(block.module.register_forward_hook(hook).remove)
            if last and self.model.head is not None:
                held.callback(self.model.head.register_forward_pre_hook(partial(self._at_head, pending)).remove)
            if stacks:
                held.enter_context(Slices(stacks))
            try:
                yield
            finally:
                self._shared.clear()

    def _at_head(self, pending: set[str], module: torch.nn.Module, args: Any) -> None:
        """Stop in front of the head, or give it its weights."""
        wanted = any(place.module is module and place.every & self.outputs for place in self.places)
        if not wanted and not pending:
            raise Stop
        self.model.load(self.model.head_groups)

    def _hook(self, place: Place, tell: Tell, held: contextlib.ExitStack) -> None:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            tell(x, None, 0)

        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            tell(None, output[0] if isinstance(output, tuple) else output, 0)

        if place.has_input and place.every & self.inputs:
            held.callback(place.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        if place.every & self.outputs:
            held.callback(place.module.register_forward_hook(after).remove)

    def _tell(self, place: Place, tokens: Tokens, told: Told) -> Tell:
        """How a place tells of an input, an output or both, of one expert."""
        owner = self.model.block_of(place.path)

        def tell(x: torch.Tensor | None, y: torch.Tensor | None, expert: int) -> None:
            names = place.names[0 if place.fused else expert]
            number = expert if place.fused else None
            wanted = [name for name in names if name in self.inputs] if x is not None else []
            if wanted and x is not None:
                self.seen.update((name, "input") for name in wanted)
                leader = self._leader(wanted, x, (owner.path if owner else "", number))
                if leader is not None:
                    told(self._checked(leader, "input", number, self._input_rows(place, x, tokens)))
            if y is not None:
                for name, part in self._outputs(place, names, y):
                    self.seen.add((name, "output"))
                    told(self._checked(name, "output", number, self._rows(place, part, tokens)))

        return tell

    def _leader(self, names: list[str], x: torch.Tensor, where: tuple[str, int | None]) -> str | None:
        """The name to tell an input under; None where it was told already, of another tensor that shares it."""
        # The tensor is kept until the pass is over, so that no other one gets its id.
        _, leader = self._shared.setdefault((id(x), x._version, where), (x, names[0]))
        for name in names:
            if self.leaders.setdefault(name, leader) != leader:
                raise RunError("shares its input with other tensors in one batch and not in another", name)
        return leader if leader == names[0] else None

    def _input_rows(self, place: Place, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        if place.kind == "conv":
            x = patches(x, place.module)
        return self._rows(place, x, tokens)

    def _rows(self, place: Place, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        if place.kind == "stack":  # padding never got here
            return x.detach().reshape(-1, x.shape[-1]).float()
        return tokens.rows(x, place.path)

    def _outputs(self, place: Place, names: tuple[str, ...], y: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = [name for name in names if name in self.outputs]
        if not wanted:
            return
        if place.kind == "conv":
            y = channels_last(y)
        if len(names) == 1 and place.widths:
            yield wanted[0], y
            return
        if sum(place.widths) != y.shape[-1]:
            what = "is stored in another shape than it is computed with, so its outputs cannot be told apart"
            raise PlanError(what, wanted[0])
        for name, part in zip(names, y.split(place.widths, dim=-1), strict=True):
            if name in wanted:
                yield name, part

    def _after_block(self, block: Block, tokens: Tokens, told: Told, module: Any, args: Any, output: Any) -> None:
        self.tell_block(block, output, tokens, told)

    def tell_block(self, block: Block, output: Any, tokens: Tokens, told: Told) -> None:
        """Tell what a block made, if that is wanted; refuse what is not finite.

        Raises:
            NonFinite: it holds a NaN or an infinity.
        """
        state = output[0] if isinstance(output, (tuple, list)) else output
        seen = self._checked(block.name, "output", None, tokens.rows(state, block.path))
        if block.name in self.outputs:
            self.seen.add((block.name, "output"))
            told(seen)

    def _checked(self, name: str, side: str, expert: int | None, rows: torch.Tensor) -> Seen:
        if not bool(rows.isfinite().all()):
            of = "" if expert is None else f" (expert {expert})"
            raise NonFinite(
                f"the {side} of its module{of} holds a NaN or an infinity",
                f"{self.model.label}: {name}",
                "nothing was recorded; try other calibration data, or leave this model out",
            )
        return Seen(name, side, expert, rows)
