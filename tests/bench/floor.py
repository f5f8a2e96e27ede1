"""The floor: every source byte read once and every output byte written once, with the engine's own primitives.

Run as `python -m tests.bench.floor OUTPUT SOURCE…`; prints the seconds it took.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mergetool.execute.buffers import Arena
from mergetool.plan.memory import WRITERS, default_workers, machine_memory
from mergetool.storage.header import read_header
from mergetool.storage.reader import Reader
from mergetool.storage.shards import Shard
from mergetool.storage.system import PAGE
from mergetool.storage.writer import Writer

PIECE = 2 << 20


def copy(output: Path, sources: list[Path]) -> float:
    """Read all sources side by side and write as many bytes as the first has; seconds.

    Sources that are more than the page cache is likely to keep are let go of as the engine lets go of them.
    """
    header = read_header(sources[0])
    with sources[0].open("rb") as file:
        preamble = file.read(header.data_start)
    arena, phase = Arena(), header.data_start % PAGE
    began = time.perf_counter()
    readers = [Reader(source) for source in sources]
    overflows = sum(source.stat().st_size for source in sources) > machine_memory() // 2

    def move(start: int) -> None:
        length = min(PIECE, header.file_size - start)
        buffers = [buffer[phase : phase + length] for buffer in arena.take([PIECE + PAGE] * len(readers))]
        for reader, buffer in zip(readers, buffers, strict=True):
            reader.read_into(buffer, start)
            if overflows:
                reader.forget(start, length)
        writer.write(buffers[0], start)

    with (
        Writer(output, Shard(output.name, header, preamble)) as writer,
        ThreadPoolExecutor(default_workers() + WRITERS) as pool,
    ):
        for _ in pool.map(move, range(header.data_start, header.file_size, PIECE)):
            pass
        writer.sync()
    for reader in readers:
        reader.close()
    return time.perf_counter() - began


if __name__ == "__main__":
    print(copy(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]))
