"""What was measured, kept: the numbers of every section, the page and the README's table made of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import fill
from types import ModuleType
from typing import Any

from mergetool.version import __version__

from . import compare, cores, gpu, kernels, profile, scaling, small, workers

SECTIONS: Mapping[str, tuple[str, ModuleType]] = {
    "compare": ("Against mergekit and against the floor", compare),
    "profile": ("Where the time goes", profile),
    "kernels": ("Kernels", kernels),
    "scaling": ("Larger models", scaling),
    "workers": ("Workers", workers),
    "cores": ("Workers on many cores", cores),
    "small": ("Small tensors", small),
    "gpu": ("A GPU", gpu),
}
"""The sections in the page's order: title, and the module that measures one and writes its part of the page."""
NUMBERS, PAGE = "benchmarks.json", "benchmarks.md"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
HEAD = """# Benchmarks

Made by `python -m tests.bench`, each section by the command it names. Checkpoints are Llama-shaped, bfloat16, made on
the fly; of the deltas half are exactly zero. [benchmarks.json](benchmarks.json) has the numbers of every run.
"""


def read(folder: Path) -> dict[str, Any]:
    """The sections measured so far."""
    path = folder / NUMBERS
    return dict(json.loads(path.read_text())) if path.exists() else {}


def merged(before: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured now, and of what was measured before the sections that were not measured again."""
    both = {**before, **found}
    return {name: both[name] for name in SECTIONS if name in both}


def machine() -> str:
    """The machine in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}"
    )


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    found = {"Python": platform.python_version(), "mergetool": __version__}
    for name in ("numpy", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "?"
    return found


def page(sections: Mapping[str, Any]) -> str:
    """The page, of whatever sections there are."""
    parts = [HEAD]
    for name, (title, module) in SECTIONS.items():
        if name in sections:
            parts.append(f"## {title}\n\n{wrapped(made(sections[name]))}\n\n{wrapped(module.page(sections[name]))}\n")
    return "\n".join(parts)


def wrapped(text: str) -> str:
    """Text with its paragraphs, but not its tables, in lines of the repository's width."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        part if part.startswith("|") else fill(part, 120, break_long_words=False, break_on_hyphens=False)
        for part in paragraphs
    )


def made(section: Mapping[str, Any]) -> str:
    """When, how and where a section was measured."""
    said = section["made"]
    told = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in section["settings"].items() if name != "weights")
    note = f" {said['note']}" if said.get("note") else ""
    return f"`{said['command']}` on {said['date']}: {settings}. {said['machine']}; {told}.{note}"


def readme(text: str, sections: Mapping[str, Any]) -> str:
    """The README with its table of the comparison made anew."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{compare.summary(sections['compare']['costs'])}\n{END}{after}"


def write(folder: Path, sections: Mapping[str, Any]) -> None:
    """Write the numbers and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NUMBERS).write_text(json.dumps(sections, indent=1, ensure_ascii=False) + "\n")
    (folder / PAGE).write_text(page(sections))
