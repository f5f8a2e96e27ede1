"""Everything that is measured of speed and memory, side by side in one run.

    python -m tests.bench                          mergekit, mergetool and the floor: 1.1 B parameters, every method
    python -m tests.bench --size 100m --repeats 1  a quick look
    python -m tests.bench --no-mergekit --cold     without mergekit, warm and cold
    python -m tests.bench --kernels --workers      other sections; --all for all of them
    python -m tests.bench --all --write            docs/benchmarks.* made anew
    python -m tests.bench --render                 the page and the plots again from docs/benchmarks.json

A section that is not measured again keeps its numbers, its date and its machine. Checkpoints are made in
`$MERGETOOL_BENCH`, by default ~/.cache/mergetool/bench: 6.6 GB for the 1.1 B size, and 2.2 GB for outputs. --scaling
takes up to 32 GB more for a while.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from . import report
from .checkpoints import SIZES
from .plots import plots
from .work import RECIPES, ROOT, Bench

HELP = {
    "compare": "mergekit, mergetool and the floor (what is measured if nothing else is asked for)",
    "profile": "seconds of processor time by what they are spent on",
    "kernels": "nanoseconds for an element, every kernel",
    "scaling": "1.1 B, 4 B and one tensor of half a billion weights",
    "workers": "one, two and three workers",
    "small": "many small tensors",
    "cores": "from one worker to as many as there are cores, for machines of many; not part of --all",
    "gpu": "a GPU: its link, kernels and merges on it, and whether they make what the CPU makes; not part of --all",
}


ELSEWHERE = ("cores", "gpu")
"""The sections that are for other machines than the rest."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    described = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__, formatter_class=described)
    for name, text in HELP.items():
        made.add_argument(f"--{name}", action="store_true", help=text)
    made.add_argument("--all", action="store_true", help="every section")
    made.add_argument("--size", choices=SIZES, default="1.1b")
    made.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES), help="of compare and workers")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--mergekit-repeats", type=int, default=1)
    made.add_argument("--no-mergekit", action="store_true", help="compare with the floor alone")
    made.add_argument("--cold", action="store_true", help="compare with nothing in the page cache too")
    made.add_argument("--write", action="store_true", help="write docs/benchmarks.* and the README's table")
    made.add_argument("--render", action="store_true", help="measure nothing, write the page and plots again")
    made.add_argument("--take", type=Path, metavar="FOLDER", help="take sections that were written elsewhere --into it")
    made.add_argument("--into", type=Path, metavar="FOLDER", help="write there, and leave docs and README alone")
    made.add_argument("--note", default="", help="what readers of these figures should know")
    return made


def wanted(args: argparse.Namespace) -> list[str]:
    """The sections that were asked for."""
    if args.render or args.take:
        return []
    asked = [name for name in HELP if getattr(args, name) or (args.all and name not in ELSEWHERE)]
    return asked or ["compare"]


def command(words: Sequence[str]) -> str:
    """The command as the page names it: without the folder it writes into and without the note."""
    told: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--into", "--note"):
            next(rest, None)
        elif not word.startswith(("--into=", "--note=")):
            told.append(f'"{word}"' if " " in word else word)
    return " ".join(["python -m tests.bench", *told])


def mergekit(args: argparse.Namespace) -> str | None:
    """The command of mergekit, installed on first use; None where nobody wants it."""
    if args.no_mergekit or "compare" not in wanted(args):
        return None
    sys.path.insert(0, str(ROOT / "tests"))
    from judge.mergekit_env import mergekit_yaml

    found, reason = mergekit_yaml()
    return str(found) if found else sys.exit(f"no mergekit: {reason}; leave it out with --no-mergekit")


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what was found, with what was found before."""
    folder = args.into or ROOT / "docs"
    sections = report.merged(report.read(folder), found)
    report.write(folder, sections)
    if args.into is None and "compare" in sections:
        page = ROOT / "README.md"
        page.write_text(report.readme(page.read_text(), sections))
    try:
        plots(sections, folder)
    except ImportError:
        print("no plots: matplotlib cannot be imported", file=sys.stderr)


def main() -> None:
    """Parse the arguments, measure section by section, print each, and write what was asked for."""
    args = parser().parse_args()
    folder = Path(os.environ.get("MERGETOOL_BENCH") or Path.home() / ".cache" / "mergetool" / "bench")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        folder, args.size, args.methods, args.repeats, args.mergekit_repeats, mergekit(args), args.cold
    )  # fmt: skip
    made = {"command": command(sys.argv[1:]), "machine": report.machine(), "versions": report.versions()}
    for name in wanted(args):
        title, module = report.SECTIONS[name]
        print(f"== {title}", flush=True)
        section = {"made": {**made, "date": str(date.today()), "note": args.note}, **module.measure(bench)}
        if name == "compare" and bench.mergekit:
            section["made"]["versions"] = {**made["versions"], "mergekit": "0.1.5"}  # type: ignore[dict-item]
        print(f"\n{module.page(section)}\n", flush=True)
        if args.write or args.into:
            save(args, {name: section})
    if args.render or args.take:
        save(args, report.read(args.take) if args.take else {})


if __name__ == "__main__":
    main()
