"""Coordinate texts compiled for an NVIDIA GPU: one kernel for each, launched on whole tiles that are copied there.

The kernels compute what those of the CPU compute, operation by operation, sums in the same order too, so the bytes are
the same. Every worker has a stream and buffers of its own: while one's kernel runs, others' tiles go over the link.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, Stream, launch

from mergetool.kernels import cuda_kernels
from mergetool.kernels.backend import BLOCK, THRESHOLDS, Array, Layout, Text
from mergetool.kernels.calling import addresses, flat, lanes_of, tiles_of
from mergetool.kernels.cuda_kernels import THREADS, Sizes
from mergetool.kernels.objects import once

MOST_BLOCKS = 2048
"""Blocks of threads that a kernel is launched with at most; each goes on to further coordinates."""
Kernel = Any
"""A kernel of ``cuda.core``."""


class Cuda:
    """Kernels on one GPU.

    Args:
        device: as torch names it: ``cuda``, ``cuda:1``; ``cpu`` for tests, whose ``cuda.core`` is a stand-in.

    Raises:
        Exception: of ``cuda.core``, if there is no compiler for the GPU.
    """

    def __init__(self, device: str) -> None:
        self.matrices = device
        self._device = torch.device(device)
        self._gpu = Device(self._device.index or 0)
        self._own = threading.local()
        self._made: Callable[..., Kernel] = once(lambda make, *of: _kernel(make(*of), self._gpu.arch))
        _kernel('extern "C" __global__ void kernel() {}', self._gpu.arch)  # fails now if any would

    def combine(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout
    ) -> Callable[..., int]:
        """As :meth:`mergetool.kernels.backend.Backend.combine`."""
        tiles = tiles_of(layout)

        def run(start: int, inputs: Sequence[Array], out: Array, keys: Sequence[Any], *rest: Any) -> int:
            kernel = self._made(cuda_kernels.combine, text, tensors, arguments, layout, _sizes(rest))
            lane, size, drawn = self._lane(), inputs[0].size, _keys(keys) if "chance" in tensors else []
            with lane.stream:
                places = lane.give(inputs, tiles, size)
                result = lane.room("out", out.nbytes)
                tile = start, size, *places, result.data_ptr(), lane.strange.data_ptr()
                lane.launch(kernel, _threads(size), *tile, *drawn, *flat(rest))
                return lane.take(result, out)

        return run

    def sums(
        self, text: Text, tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, terms: int
    ) -> Callable[..., None]:
        """As :meth:`mergetool.kernels.backend.Backend.sums`."""
        tiles = tiles_of(layout)

        def run(start: int, inputs: Sequence[Array], partial: Array, keys: Sequence[Any], *values: Any) -> None:
            kernel = self._made(cuda_kernels.sums, text, tensors, arguments, layout, terms, _sizes(values))
            lane, size, drawn = self._lane(), inputs[0].size, _keys(keys) if "chance" in tensors else []
            if not size:  # no block of coordinates, and so no block of threads
                return
            with lane.stream:
                tile = start, size, *lane.give(inputs, tiles, size), lane.room("partial", partial.nbytes).data_ptr()
                config = LaunchConfig(grid=-(-size // BLOCK), block=lanes_of(terms))
                lane.launch(kernel, config, *tile, *drawn, *flat(values))
                partial[...] = lane.read("partial", partial.nbytes).view(np.float64).reshape(partial.shape)

        return run

    def above(self, layout: Layout, count: int = THRESHOLDS) -> Callable[..., None]:
        """As :meth:`mergetool.kernels.backend.Backend.above`."""
        kernel, tiles = self._made(cuda_kernels.above, layout, count), tiles_of(layout)

        def run(inputs: Sequence[Array], thresholds: Array, counts: Array) -> None:
            lane, size = self._lane(), inputs[0].size
            with lane.stream:
                tile = size, *lane.give(inputs, tiles, size), lane.zeros("counts", counts.nbytes)
                cuts = map(int, thresholds.reshape(-1))
                lane.launch(kernel, _threads(size, layout.sources), *tile, *cuts)
                counts += lane.read("counts", counts.nbytes).view(np.int64).reshape(counts.shape)

        return run

    def between(self, layout: Layout) -> Callable[..., None]:
        """As :meth:`mergetool.kernels.backend.Backend.between`."""
        kernel, tiles = self._made(cuda_kernels.between, layout), tiles_of(layout)

        def run(inputs: Sequence[Array], low: Array, high: Array, found: Array, used: Array) -> None:
            lane, size = self._lane(), inputs[0].size
            with lane.stream:
                gathered = lane.room("gathered", 4 * size * layout.sources)
                tile = size, *lane.give(inputs, tiles, size), gathered.data_ptr(), lane.zeros("counts", used.nbytes)
                bounds = (int(each) for pair in zip(low, high, strict=True) for each in pair)
                lane.launch(kernel, _threads(size, layout.sources), *tile, *bounds)
                for i, hits in enumerate(lane.read("counts", used.nbytes).view(np.int64)):
                    taken = min(int(hits), found.shape[1] - int(used[i]))
                    there = gathered[4 * size * i :][: 4 * taken]
                    found[i, used[i] : used[i] + taken] = there.cpu().numpy().view(np.uint32)
                    used[i] += taken

        return run

    def _lane(self) -> _Lane:
        """What the calling worker works with."""
        if not hasattr(self._own, "lane"):
            self._own.lane = _Lane(self._device, self._gpu)
        lane: _Lane = self._own.lane
        return lane


class _Lane:
    """A worker's stream and its buffers on the GPU, which grow to the largest that is wanted and stay."""

    def __init__(self, device: torch.device, gpu: Any) -> None:
        self._device = device
        with nullcontext() if device.type == "cpu" else torch.cuda.device(device):  # the caller's own comes back
            gpu.set_current()
        self._queue = None if device.type == "cpu" else torch.cuda.Stream(device)
        self._stream = Stream.from_handle(self._queue.cuda_stream if self._queue else 0)
        self._rooms: dict[Any, torch.Tensor] = {}
        with self.stream:
            self.strange = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=self._queue is not None)
        self._before = 0

    @property
    def stream(self) -> Any:
        """The worker's stream, as a context in which torch uses it."""
        return torch.cuda.stream(self._queue)

    def room(self, name: Any, nbytes: int) -> torch.Tensor:
        """A buffer of at least so many bytes, by its name."""
        found: torch.Tensor | None = self._rooms.get(name)
        if found is None or found.nbytes < nbytes:
            found = self._rooms[name] = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return found

    def zeros(self, name: Any, nbytes: int) -> int:
        """Where a buffer begins whose bytes are zero."""
        place: int = self.room(name, nbytes)[:nbytes].zero_().data_ptr()
        return place

    def give(self, inputs: Sequence[Array], kinds: Sequence[str], size: int) -> list[int]:
        """Copy tiles to the GPU; where they lie there. From pinned memory they go by themselves.

        Raises:
            ValueError: they are not what a kernel takes them for.
        """
        addresses(inputs, kinds, size)
        places = []
        for i, raw in enumerate(inputs):
            there = self.room(i, raw.nbytes)[: raw.nbytes]
            there.copy_(torch.from_numpy(raw.view(np.uint8)), non_blocking=True)
            places.append(there.data_ptr())
        return places

    def launch(self, kernel: Kernel, config: LaunchConfig, *arguments: Any) -> None:
        """Launch a kernel behind what was copied."""
        launch(self._stream, config, kernel, *arguments)

    def read(self, name: Any, nbytes: int) -> Array:
        """What a kernel has put in a buffer, when it is there."""
        found: Array = self.room(name, nbytes)[:nbytes].cpu().numpy()
        return found

    def take(self, result: torch.Tensor, out: Array) -> int:
        """Copy a tile's result from the GPU and wait for it; at how many coordinates something was not finite."""
        torch.from_numpy(out.view(np.uint8)).copy_(result[: out.nbytes], non_blocking=True)
        self._seen.copy_(self.strange, non_blocking=True)
        if self._queue is not None:
            self._queue.synchronize()
        seen, before = int(self._seen), self._before
        self._before = seen
        return seen - before


def _kernel(source: str, arch: str) -> Kernel:
    """Compile a source's kernel, products and sums rounded each for itself as on the CPU."""
    options = ProgramOptions(std="c++17", arch=f"sm_{arch}", fma=False, disable_warnings=True)
    return Program(source, "c++", options).compile("cubin").get_kernel("kernel")


def _threads(size: int, layers: int = 1) -> LaunchConfig:
    """Threads for so many coordinates, each of which goes on to further ones where there are very many; in layers."""
    return LaunchConfig(grid=(max(1, min(-(-size // THREADS), MOST_BLOCKS)), layers), block=THREADS)


def _sizes(values: Sequence[Any]) -> Sizes:
    return tuple(len(value) if isinstance(value, tuple) else None for value in values)


def _keys(keys: Sequence[Any]) -> list[np.uint64]:
    return [np.uint64(key) for key in keys]
