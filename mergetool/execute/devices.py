"""Where kernels run: the CPU, or one or several GPUs; and the memory that each likes to be fed from."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

from mergetool.errors import PlanError, RunError
from mergetool.execute.buffers import Bytes, aligned
from mergetool.kernels.backend import THRESHOLDS, Backend, Layout, Text, compiled, with_torch

Kernel = Callable[..., Any]


class Several:
    """Backends side by side: every worker has one of them for good, so jobs are dealt out and not tiles.

    Args:
        backends: they compute the same bytes.
    """

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._deal = cycle(range(len(backends)))
        self._backends = backends
        self._own = threading.local()
        self._guard = threading.Lock()

    @property
    def matrices(self) -> str:
        """Where whole matrices are solved, one after the other: the first device."""
        return self._backends[0].matrices

    def _mine(self) -> int:
        """The backend of the worker that asks."""
        if not hasattr(self._own, "place"):
            with self._guard:
                self._own.place = next(self._deal)
        place: int = self._own.place
        return place

    def _each(self, make: Callable[[Backend], Kernel]) -> Kernel:
        kernels = [make(backend) for backend in self._backends]
        return lambda *arguments: kernels[self._mine()](*arguments)

    def combine(self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout) -> Kernel:
        """As :meth:`mergetool.kernels.backend.Backend.combine`."""
        return self._each(lambda backend: backend.combine(text, tensors, arguments, layout))

    def sums(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, terms: int
    ) -> Kernel:
        """As :meth:`mergetool.kernels.backend.Backend.sums`."""
        return self._each(lambda backend: backend.sums(text, tensors, arguments, layout, terms))

    def above(self, layout: Layout, count: int = THRESHOLDS) -> Kernel:
        """As :meth:`mergetool.kernels.backend.Backend.above`."""
        return self._each(lambda backend: backend.above(layout, count))

    def between(self, layout: Layout) -> Kernel:
        """As :meth:`mergetool.kernels.backend.Backend.between`."""
        return self._each(lambda backend: backend.between(layout))


def backend_for(device: str) -> Backend:
    """Where a device's kernels run: ``cpu`` is compiled, ``torch:cpu`` the GPU's code on the CPU.

    Several devices stand between commas: ``cuda:0,cuda:1``.

    Raises:
        PlanError: there is no such device.
    """
    names = [name.strip() for name in device.split(",")]
    if len(names) > 1:
        return Several([backend_for(name) for name in names])
    if device == "cpu":
        return compiled()
    name = device.removeprefix("torch:")
    if name.split(":")[0] not in ("cuda", "cpu"):
        raise PlanError(f"there is no device `{device}`", "--device", "use cpu, cuda, cuda:<number> or cuda:0,cuda:1")
    import torch

    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        number = name.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= count:
            have = f"there are {count} GPUs" if count else "torch finds no GPU here"
            raise PlanError(f"cannot use `{device}`: {have}", "--device", "use `--device cpu`")
    return with_torch(name)


def memory_for(device: str) -> Callable[[int], Bytes]:
    """What makes the buffers that tiles are read into and results written from.

    For a GPU they are pinned: the card copies out of them and into them by itself while the worker's neighbour
    computes, and the disk reads and writes them directly all the same, since they begin with a page.
    """
    if not any(name.strip().startswith("cuda") for name in device.split(",")):
        return aligned
    import torch

    def pinned(nbytes: int) -> Bytes:
        buffer: Bytes = torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True).numpy()[:nbytes]
        return buffer

    return pinned


def torch_names(device: str) -> str:
    """Devices as torch names them, with commas between, for models that are run: ``cpu`` for ``torch:cpu``."""
    return ",".join(name.strip().removeprefix("torch:") for name in device.split(","))


@contextlib.contextmanager
def gpu_memory() -> Iterator[None]:
    """Say what a GPU that has no room comes to; also around a function.

    Raises:
        RunError: in place of torch's own error.
    """
    try:
        yield
    except Exception as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        fix = "give fewer `--workers`, end what else runs there, or use `--device cpu`"
        raise RunError(f"the GPU has no room: {str(error).splitlines()[0]}", "--device", fix) from error
