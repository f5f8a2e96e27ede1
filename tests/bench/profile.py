"""Where the processor's time of a merge goes: kernels, reading, writing, and what is left; what bounds each figure.

The functions that do the work are wrapped in a process of their own: each adds the processor time of the thread that
runs it. What they take together is less than what the process takes by what is between them, and by start-up.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .markdown import number, table
from .measure import run, settle, warm
from .work import Bench, Work, compile_kernels

PARTS = {
    "combining": "the method's kernel, over every tile",
    "looking": "sums, and counts of magnitudes for cuts",
    "reading": "from the page cache into buffers",
    "writing": "from buffers past the page cache",
    "digests": "of every block that is written",
}
"""What is told apart, and what it is."""
Wrapped = Callable[..., Any]


class Clock:
    """Seconds of processor time by part, of all threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def timed(self, part: str, function: Wrapped) -> Wrapped:
        """The function, its time added to a part."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds[part] += time.thread_time() - began

        return wrapped

    def makes(self, part: str, make: Wrapped) -> Wrapped:
        """The same for what a function makes."""
        return lambda *args, **kwargs: self.timed(part, make(*args, **kwargs))


def child(recipe: str, output: str) -> dict[str, float]:
    """Run a recipe with its parts timed; what it took of the processor, start-up left out where it is known."""
    import mergetool
    from mergetool.execute import job
    from mergetool.kernels import compile
    from mergetool.storage import reader, writer

    clock = Clock()
    compile.combine = clock.makes("combining", compile.combine)
    for name in ("sums", "above", "between"):
        setattr(compile, name, clock.makes("looking", getattr(compile, name)))
    reader.Reader.read_into = clock.timed("reading", reader.Reader.read_into)
    writer.Writer.write = clock.timed("writing", writer.Writer.write)
    job.digests = clock.timed("digests", job.digests)
    plan = mergetool.build(mergetool.load(recipe))
    mergetool.run(plan, output, force=True)  # what is loaded once is loaded
    shutil.rmtree(output)
    clock.seconds.clear()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    mergetool.run(plan, output, force=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**{part: clock.seconds[part] for part in PARTS}, "all": used, "wall": wall}


def measure(bench: Bench) -> dict[str, Any]:
    """Profile every piece of work, page cache warm, and time a start that merges nothing."""
    models = bench.models()
    compile_kernels(bench, bench.methods)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    output = str(bench.folder / "out")
    for name in bench.methods:
        work = Work(name, models, bench.folder)
        work.command("mergetool")  # writes the recipe
        recipe = bench.folder / f"{name.replace(' ', '-')}.yaml"
        for _ in range(bench.repeats):
            settle(Path(output))
            warm(work.sources)
            cost = run([sys.executable, "-m", __spec__.name, str(recipe), output])
            found[name].append(json.loads(cost.output))
            print(name, found[name][-1], flush=True)
    settle(Path(output))
    settings = {"size": bench.size, "repeats": bench.repeats, "cores": len(os.sched_getaffinity(0))}
    return {"settings": settings, "seconds": dict(found)}


def middle(found: list[Mapping[str, float]], part: str) -> float:
    """The median of a part."""
    return sorted(each[part] for each in found)[len(found) // 2]


def page(results: Mapping[str, Any]) -> str:
    """The section of the page."""
    cores = results["settings"]["cores"]
    head = ["work", *PARTS, "the rest", "together", f"÷ {cores} cores", "wall s", "busy"]
    rows = []
    for name, found in results["seconds"].items():
        values = [middle(found, part) for part in PARTS]
        whole, wall = middle(found, "all"), middle(found, "wall")
        shown = [number(value) for value in (*values, max(whole - sum(values), 0.0), whole, whole / cores, wall)]
        rows.append([f"`{name}`", *shown, f"{100 * whole / cores / wall:.0f} %"])
    what = "; ".join(f"*{part}*: {said}" for part, said in PARTS.items())
    said = (
        f"Seconds of processor time of the second of two runs in one process, page cache warm; medians. {what}. "
        f"A run cannot be shorter than its processor time over the number of cores: where *busy* is near 100 %, the "
        "processor bounds it and not the disk."
    )
    return f"{said}\n\n{table(head, rows)}"


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:])))
