"""The kernels of :class:`mergetool.kernels.backend.Backend` as C++ for NVIDIA's GPUs, made from a text and a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import Template
from typing import Any

from mergetool.kernels.backend import BLOCK, Layout, measure_names
from mergetool.kernels.calling import lanes_of
from mergetool.kernels.cuda_prelude import PRELUDE, TYPES
from mergetool.kernels.cuda_text import functions

Sizes = tuple[int | None, ...]
"""How many numbers each measure and parameter of a text is; None for one that is no tuple."""

THREADS = 256
"""Threads of a block, where their number decides nothing."""

COMBINE = """
extern "C" __global__ void kernel(i64 start, i64 size, $tiles, $output* out, u64* strange$keys$numbers) {
    u32 bad = 0;
    for (i64 k = blockIdx.x * (i64)blockDim.x + threadIdx.x; k < size; k += gridDim.x * (i64)blockDim.x) {
        $load
        $output result = narrow_$dtype(whole_text($call));
        out[k] = result;
        bad += u32(($bad) != 0);
    }
    if (bad) atomicAdd(strange, (u64)bad);
}
"""
SUMS = """
extern "C" __global__ void __launch_bounds__($lanes) kernel(i64 start, i64 size, $tiles, double* partial$keys$numbers) {
    __shared__ double lanes[$terms * $lanes];
    i64 end = (blockIdx.x + 1) * (i64)$block < size ? (blockIdx.x + 1) * (i64)$block : size;
    for (int lane = threadIdx.x; lane < $lanes; lane += blockDim.x) {
        double own[$terms] = {};
        for (i64 k = blockIdx.x * (i64)$block + lane; k < end; k += $lanes) {
            $load
            auto terms = whole_text($call);
            for (int i = 0; i < $terms; i++) own[i] += terms[i];
        }
        for (int i = 0; i < $terms; i++) lanes[i * $lanes + lane] = own[i];
    }
    for (int half = $lanes / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int lane = threadIdx.x; lane < half; lane += blockDim.x)
            for (int i = 0; i < $terms; i++) lanes[i * $lanes + lane] += lanes[i * $lanes + half + lane];
    }
    if (threadIdx.x == 0) for (int i = 0; i < $terms; i++) partial[blockIdx.x * $terms + i] = lanes[i * $lanes];
}
"""
MAGNITUDES = """
extern "C" __global__ void kernel(i64 size, $tiles, $further) {
    $begin
    for (i64 k = blockIdx.x * (i64)blockDim.x + threadIdx.x; k < size; k += gridDim.x * (i64)blockDim.x) {
        u32 bits = 0;
        switch (blockIdx.y) {
            $cases
        }
        $each
    }
    $end
}
"""


def combine(
    text: Callable[..., Any], tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, sizes: Sizes
) -> str:
    """A kernel that makes a tile: ``kernel(start, size, tile…, out, strange, key…, number…)``.

    ``strange`` counts the coordinates at which an input or the result is not finite; it is added to.
    """
    strange = [f"strange_{layout.output}(result)", *(f"strange_{d}(x{i}[k])" for i, d in enumerate(layout.inputs))]
    return _module(
        functions(text, layout.sources, arguments),
        COMBINE,
        **_common(tensors, arguments, layout, sizes),
        output=TYPES[layout.output],
        dtype=layout.output,
        bad=" | ".join(strange),
    )


def sums(
    text: Callable[..., Any],
    tensors: tuple[str, ...],
    arguments: tuple[str, ...],
    layout: Layout,
    terms: int,
    sizes: Sizes,
) -> str:
    """A kernel that adds up blocks: ``kernel(start, size, tile…, partial, key…, number…)``.

    A block of threads does each of them, in the order of the CPU's kernel: as many threads as that has lanes.
    """
    return _module(
        functions(text, layout.sources, arguments),
        SUMS,
        **_common(tensors, arguments, layout, sizes),
        terms=terms,
        lanes=lanes_of(terms),
        block=BLOCK,
    )


def above(layout: Layout, count: int) -> str:
    """A kernel that counts magnitudes: ``kernel(size, tile…, counts, threshold…)``, thresholds by source.

    Source by source is done by ``blockIdx.y``; ``counts`` are added to.
    """
    cuts, sources = range(count), range(layout.sources)
    own = [" ".join(f"t{n} = t{i}_{n};" for n in cuts) for i in sources]
    return _magnitudes(
        layout,
        further=f"u64* counts, {', '.join(f'u64 t{i}_{n}' for i in sources for n in cuts)}",
        begin=[
            f"u32 {', '.join(f'c{n} = 0, t{n} = 0' for n in cuts)};",
            *(f"if (blockIdx.y == {i}) {{ {own[i]} }}" for i in sources),
        ],
        each=[f"c{n} += bits >= t{n};" for n in cuts],
        end=[
            "for (int lane = 16; lane > 0; lane /= 2) {",
            *(f"    c{n} += __shfl_down_sync(0xFFFFFFFFu, c{n}, lane);" for n in cuts),
            "}",
            "if (threadIdx.x % 32 == 0) {",
            *(f"    if (c{n}) atomicAdd(counts + blockIdx.y * {count} + {n}, (u64)c{n});" for n in cuts),
            "}",
        ],
    )


def between(layout: Layout) -> str:
    """A kernel that gathers magnitudes: ``kernel(size, tile…, found, used, low…, high…)``, in any order.

    ``found`` has room for all of a tile of each source; ``used`` counts those of each, from zero.
    """
    return _magnitudes(
        layout,
        further=f"u32* found, u64* used, {', '.join(f'u64 l{i}, u64 h{i}' for i in range(layout.sources))}",
        begin=[
            "u32 low = 0, high = 0;",
            *(f"if (blockIdx.y == {i}) {{ low = l{i}; high = h{i}; }}" for i in range(layout.sources)),
        ],
        each="if (bits - low < high - low) found[blockIdx.y * size + atomicAdd(used + blockIdx.y, (u64)1)] = bits;",
        end="",
    )


def _magnitudes(layout: Layout, **parts: str | Sequence[str]) -> str:
    cases = [
        f"case {i - 1}: bits = as<u32>(float(fabs(widen_{dtype}(x{i}[k]) - widen_{layout.inputs[0]}(x0[k])))); break;"
        for i, dtype in enumerate(layout.inputs)
        if i
    ]
    return _module("", MAGNITUDES, tiles=_tiles(layout), cases=cases, **parts)


def _module(texts: str, kernel: str, **parts: str | int | Sequence[str]) -> str:
    """The whole source; a part that is several lines stays where the first of them is."""
    lines = []
    for line in kernel.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        whole = {n: part if isinstance(part, str | int) else f"\n{indent}".join(part) for n, part in parts.items()}
        lines.append(Template(line).substitute(whole))
    return "\n".join([PRELUDE, texts, *lines])


def _tiles(layout: Layout) -> str:
    kinds = [*(TYPES[dtype] for dtype in layout.inputs), *["float"] * (len(layout.extras) * layout.sources)]
    return ", ".join(f"const {kind}* x{i}" for i, kind in enumerate(kinds))


def _common(tensors: tuple[str, ...], arguments: tuple[str, ...], layout: Layout, sizes: Sizes) -> dict[str, Any]:
    """What the kernels of a text have in common: their parameters, and how they give it the numbers of a coordinate."""
    names = (*measure_names(tensors, layout.extras), *arguments)
    keys = [f", u64 key{i}" for i in range(layout.sources)] if "chance" in tensors else []
    numbers, given, place = [], {name: f"e{n}" for n, name in enumerate(layout.extras)}, 0
    for name, size in zip(names, sizes, strict=True):
        own = [f"n{place + i}" for i in range(1 if size is None else size)]
        place += len(own)
        numbers += [f", double {number}" for number in own]
        given[name] = own[0] if size is None else f"pack({', '.join(own)})"
    return {
        "tiles": _tiles(layout),
        "keys": "".join(keys),
        "numbers": "".join(numbers),
        "load": _load(layout, tensors),
        "call": ", ".join(given.get(name, name) for name in (*tensors, *arguments)),
    }


def _load(layout: Layout, tensors: Sequence[str]) -> list[str]:
    """Lines that give every tensor argument of the text its value at coordinate k."""
    lines = [f"double w{i} = widen_{dtype}(x{i}[k]);" for i, dtype in enumerate(layout.inputs)]
    values = [f"w{i}" for i in range(int(layout.base), len(layout.inputs))]
    if layout.base:
        lines.append("double base = w0;")
    if "value" in tensors:
        lines.append(f"auto value = pack({', '.join(values)});")
    if "delta" in tensors:
        lines.append(f"auto delta = pack({', '.join(f'{value} - w0' for value in values)});")
    if "chance" in tensors:
        draws = [f"drawn(key{i}, u64(start + k))" for i in range(layout.sources)]
        lines.append(f"auto chance = pack({', '.join(draws)});")
    for n, name in enumerate(layout.extras):
        places = [len(layout.inputs) + n * layout.sources + i for i in range(layout.sources)]
        lines.append(f"auto e{n} = pack({', '.join(f'double(x{i}[k])' for i in places)});  // {name}")
    return lines
