"""A network run over batches: as a whole, or one block at a time so that only one block's weights are in memory.

Block by block, the model's own forward is run again for every block and every batch. Blocks that are done answer at
once: the latest of its stack with what it made, those before it with tensors without data, so that a network that
looks back at them fails instead of going wrong. The block whose turn it is computes, and the pass stops behind it. So
every block gets the very arguments, masks and position embeddings that its model gives it, whatever the architecture,
at the price of embedding the tokens once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from mergetool.errors import MergetoolError, PlanError
from mergetool.execute.forward.model import Block, Model
from mergetool.execute.forward.outputs import Outputs
from mergetool.execute.forward.rows import Batch, Tokens
from mergetool.execute.forward.spread import loaded
from mergetool.execute.forward.watch import Seen, Stop, Told, Watch
from mergetool.publish.loadable import first_line

REST = "rest"
"""The name of the step that runs what is outside all blocks."""
WHOLE = "whole"
"""The name of the only step where a network is run as a whole."""


_FIX = "measure it as a whole, with all its weights in memory"


class CannotStream(PlanError):
    """A network does not run its blocks one after the other, each once."""


class _Fails(PlanError):
    """A network cannot be run on the data."""


class _Reached(Exception):
    """Tells which block a pass has come to."""

    def __init__(self, block: Block) -> None:
        super().__init__(block.name)
        self.block = block


class Run(Protocol):
    """Runs a part of the network on a batch."""

    def __call__(self, i: int, told: Told, keep: bool = True) -> None:
        """Run it on batch ``i`` and tell what is seen; unless ``keep``, nothing is kept for the next block."""


class Step:
    """A part of the network with its weights in memory, to be run on every batch.

    Attributes:
        name: the block's name on disk, :data:`REST` or :data:`WHOLE`.
        nbytes: the bytes of its weights in float32.
        run: runs it on a batch.
    """

    def __init__(self, name: str, nbytes: int, run: Run) -> None:
        self.name, self.nbytes, self.run = name, nbytes, run


def whole(model: Model, batches: Sequence[Batch], watch: Watch) -> Generator[Step, None, None]:
    """Run the network as a whole: one step with all weights in memory."""

    def run(i: int, told: Told, keep: bool = True) -> None:
        tokens = _tokens(model, batches[i])
        with contextlib.suppress(Stop), watch.on(lambda path: True, tokens, told, last=True):
            _forward(model, batches[i])

    with loaded(model):
        yield Step(WHOLE, model.nbytes(model.groups), run)


def streamed(
    model: Model, batches: Sequence[Batch], watch: Watch, folder: Path, done: Collection[str] = ()
) -> Generator[Step, None, None]:
    """Run the network block by block: a step for each, and one for what is outside.

    A step must have been run on every batch when the next one is asked for.

    Args:
        model: the model.
        batches: the keyword inputs of each forward pass.
        watch: what is to be seen.
        folder: where activations are kept between blocks; with what is there an interrupted run goes on.
        done: the blocks that an interrupted run has finished.

    Raises:
        CannotStream: the network has no blocks, or does not run them in order, each once.
    """
    if not model.blocks:
        raise CannotStream(
            "no list of layers was found in this network, so it cannot be run one layer at a time",
            model.label,
            _FIX,
        )
    stream = _Stream(model, batches, watch, Outputs(folder))
    with stream.patched():
        yield from stream.steps(done)


def nobody(seen: Seen) -> None:
    """Tell nobody."""


class _Stream:
    """A network whose blocks have been taken over."""

    def __init__(self, model: Model, batches: Sequence[Batch], watch: Watch, outputs: Outputs) -> None:
        self.model, self.batches, self.watch, self.outputs = model, batches, watch, outputs
        self.latest: dict[str, str] = {}
        """The block of each stack that was done last."""
        self.done: set[str] = set()
        self.current: Block | None = None
        self.batch = 0
        self.calls: set[str] = set()
        self.keep = True
        self.kept: dict[str, Any] = {}
        """What the latest block of each stack made of the batch, read once in a pass."""
        self.told: Told = nobody
        self.tokens = Tokens({})
        self.blank = Watch(model)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Take over the blocks' forward functions for a while."""
        before = [(block.module, vars(block.module).get("forward")) for block in self.model.blocks]
        for block in self.model.blocks:
            block.module.forward = partial(self._block, block, block.module.forward)
        try:
            yield
        finally:
            for module, own in before:
                del module.forward
                if own is not None:
                    module.forward = own
            self.model.free(self.model.groups)

    def steps(self, done: Collection[str]) -> Iterator[Step]:
        """The steps that are left."""
        head = self.model.head_groups
        self.model.load(group for group in self.model.groups_in(None) if group not in head)
        known = {block.name: block for block in self.model.blocks}
        for name in done:
            if name in known:
                self._finish(known[name], forget=False)
        while (block := self._next()) is not None:
            groups = self.model.groups_in(block)
            self.model.load(groups)
            self.current = block
            yield Step(block.name, self.model.nbytes(groups), self._run_block)
            self.current = None
            self.model.free(groups)
            self._finish(block)
        # A whole stack may lie idle: the vision tower, where all data are text.
        idle = [block for block in self.model.blocks if block.stack in self.latest and block.name not in self.done]
        if idle:
            raise CannotStream("is never run by its model", self._where(idle[0]), _FIX)
        outside = self.model.groups_in(None)
        yield Step(REST, self.model.nbytes(outside), self._run_rest)

    def _finish(self, block: Block, forget: bool = True) -> None:
        self.done.add(block.name)
        before = self.latest.get(block.stack)
        self.latest[block.stack] = block.name
        if before is not None and forget:
            self.outputs.drop(before)

    def _next(self) -> Block | None:
        """The block that a pass of the first batch comes to; None if they are all done."""
        self._start(0)
        try:
            with self.blank.on(lambda path: False, _tokens(self.model, self.batches[0]), nobody, last=True):
                self._forward()
        except _Reached as reached:
            return reached.block
        except Stop:
            return None
        return None

    def _start(self, batch: int, told: Told = nobody, keep: bool = True) -> Tokens:
        """Begin a pass; which places of the batch count."""
        self.batch, self.told, self.keep = batch, told, keep
        self.calls, self.kept = set(), {}
        self.tokens = _tokens(self.model, self.batches[batch])
        return self.tokens

    def _run_block(self, i: int, told: Told, keep: bool = True) -> None:
        assert self.current is not None  # a step of a block is the current one until the next is asked for
        path = self.current.path
        tokens = self._start(i, told, keep)
        with contextlib.suppress(Stop), self.watch.on(lambda p: f"{p}.".startswith(f"{path}."), tokens, told):
            self._forward()
            raise CannotStream("is run for some batches and not for others", self._where(self.current), _FIX)

    def _run_rest(self, i: int, told: Told, keep: bool = True) -> None:
        tokens = self._start(i, told)
        outside = self.model.is_outside
        with contextlib.suppress(Stop), self.watch.on(outside, tokens, told, last=True):
            self._forward()

    def _forward(self) -> None:
        try:
            _forward(self.model, self.batches[self.batch])
        except _Fails as error:
            if len(self.calls) < 2:  # nothing without data can have been met
                raise
            what = f"looks back at what earlier layers made: {error.problems[0].what}"
            raise CannotStream(what, self.model.label, _FIX) from error

    def _where(self, block: Block) -> str:
        return f"{self.model.label}: {block.name}"

    def _block(self, block: Block, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a block's forward is replaced by."""
        if block.name in self.calls:
            raise CannotStream("is run several times in a pass", self._where(block), _FIX)
        self.calls.add(block.name)
        if block.name in self.done:
            return self._made(block)
        if self.current is None:
            raise _Reached(block)
        if block is not self.current:
            raise CannotStream("is not reached in the same order in every batch", self._where(block), _FIX)
        output = compute(*args, **kwargs)
        self.watch.tell_block(block, output, self.tokens, self.told)
        if self.keep:
            self.outputs.put(block.name, self.batch, output)
        raise Stop

    def _made(self, block: Block) -> Any:
        """What a block that is done has made; of all but the latest only the shape."""
        latest = self.latest[block.stack]
        if block.stack not in self.kept:
            self.kept[block.stack] = self.outputs.get(latest, self.batch, self.model.device)
        output = self.kept[block.stack]
        if block.name == latest:
            return output
        if isinstance(output, tuple):
            return tuple(None if item is None else item.to("meta") for item in output)
        return output.to("meta")


def _tokens(model: Model, batch: Batch) -> Tokens:
    composed = bool(getattr(getattr(model.module, "config", None), "is_encoder_decoder", False))
    on = {key: value.to(model.device) for key, value in batch.items() if key in ("attention_mask", "pixel_values")}
    return Tokens(on, composed)


def _forward(model: Model, batch: Batch) -> Any:
    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    try:
        with torch.no_grad():
            return model.module(**inputs)
    except (MergetoolError, Stop, _Reached):
        raise
    except Exception as error:  # whatever the network's code makes of inputs that do not suit it
        what = f"cannot be run on this data ({', '.join(inputs)}): {first_line(error)}"
        raise _Fails(what, model.label, "check that the data suits the model") from error
