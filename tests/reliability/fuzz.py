"""Feed damaged headers and recipes to mergetool; nothing but its own errors may come out, soon and in little memory.

    python -m tests.reliability.fuzz header --seconds 60
    python -m tests.reliability.fuzz recipe --seconds 60

Guided by coverage where atheris is installed (`pip install atheris`), else by seeded edits of real headers and recipes.
What is found is kept in a folder, one file an input; `--replay FILE` feeds one again. The exit code is 1 if anything
was found.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
SLOWEST = 2.0
"""Seconds that one input may take."""
HANGS = 30
"""Seconds after which an input hangs, and the process is ended."""
MEMORY = 1 << 30
"""Bytes that all inputs together may take beyond what the process has at first."""
LARGEST_INPUT = 1 << 16


class Finding(Exception):
    """Something other than our own error came out."""


@dataclass(frozen=True)
class Edit:
    """One change to an input: at a place (counted around its end), so many bytes become others."""

    place: int
    removed: int
    inserted: bytes

    def on(self, content: bytes) -> bytes:
        """The content with this change."""
        at = self.place % (len(content) + 1)
        return content[:at] + self.inserted + content[at + self.removed :]


NASTY = {
    "header": (
        *(b"0", b"-1", b"1e9", b"1.5", b"18446744073709551615", b"9223372036854775808", b"9" * 400, b"NaN", b"null"),
        *(b"true", b"[]", b"{}", b"[" * 2000, b'{"a":' * 2000, b'"', b'""', b",", b":", b"]", b"}", b" " * 100),
        *(b'"dtype":"F4"', b'"dtype":"F6_E2M3"', b'"dtype":"C64"', b'"shape":[0,0]', b'"shape":[]', b"\\ud800"),
        *(b"\xff", b"\x00", b"\xed\xa0\x80", b'"__metadata__":{"a":1},', b'"__metadata__"', b"\\u0000", b"F8_E8M0"),
        *(struct.pack("<Q", n) for n in (0, 1, 100_000_000, 100_000_001, 1 << 63, (1 << 64) - 1)),
    ),
    "recipe": (
        *(b"~", b"null", b"true", b".nan", b"-.inf", b"1e400", b"0x" + b"f" * 300, b"9" * 400, b"-1", b"1:30", b"010"),
        *(
            b"[",
            b"]",
            b"{",
            b"}",
            b"- ",
            b": ",
            b"? ",
            b"\n",
            b"\n  ",
            b"\t",
            b"#",
            b"|\n",
            b">\n",
            b"'",
            b'"',
            b"---\n",
        ),
        *(
            b"&a ",
            b"*a",
            b"<<: *a\n",
            b"<<: [*a, *a]\n",
            b"!!int ",
            b"!!python/name:os.system ",
            b"!!binary ",
            b"%YAML 9",
        ),
        *(b"models:\n", b"rules: [{where: {part: mlp}, keep: a}]\n", b"where: {layers: 0-1}\n", b"value: [0, 1]\n"),
        *(b"filter: (((a*)*)*)*$\n", b"weight: [1, [2]]\n", b"merge_method: ", b"base_model: ", b"[" * 60, b"- " * 60),
        *(b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xc2\x85", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"@", b"`", b"../" * 50),
    ),
}
"""Pieces that parsers stumble over."""


WORD = re.compile(rb"[\w.+-]+")
NUMBER = re.compile(rb"\d+")
LINE = re.compile(rb"[^\n]*\n")


def random_edit(numbers: random.Random, target: str, corpus: Sequence[bytes], content: bytes) -> Edit:
    """A change as a damaged disk, a careless or a hostile hand would make it."""
    if target == "header" and numbers.random() < 0.4 and (words := list(NUMBER.finditer(content, 16))):
        word = numbers.choice(words)  # a number for another, and the text stays JSON
        near = int(word[0][:20]) + numbers.choice((-2, -1, 1, 2, 8))
        wild = numbers.choice((0, 1, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -1, 4))
        return Edit(word.start(), len(word[0]), str(numbers.choice((near, wild))).encode())
    other = numbers.choice(corpus)
    whole = LINE if target == "recipe" and numbers.random() < 0.4 else WORD
    if numbers.random() < 0.7 and (words := list(whole.finditer(content))):  # a word or line for another
        word = numbers.choice(words)
        if whole is WORD and numbers.random() < 0.4:
            inserted = numbers.choice(NASTY[target])
        else:
            inserted = numbers.choice(whole.findall(other) or [b""])
        return Edit(word.start(), numbers.choice((0, len(word[0]))), inserted)
    removed = numbers.choice((0, 1, 4, numbers.randrange(200)))
    start = numbers.randrange(len(other))
    piece = other[start : start + numbers.randrange(200)]
    inserted = numbers.choice((b"", numbers.randbytes(numbers.randrange(9)), piece, numbers.choice(NASTY[target])))
    return Edit(numbers.randrange(len(content) + 1), removed, inserted)


def corpus_of(target: str) -> list[bytes]:
    """Real inputs to begin with.

    Those of headers begin with 8 bytes that say how much longer or shorter than its header asks the file is.
    """
    if target == "recipe":
        files = [*sorted(EXAMPLES.glob("*.yaml")), *sorted((EXAMPLES / "minilm").glob("*.yaml"))]
        return [path.read_bytes() for path in files]
    found = []
    for path in sorted((EXAMPLES / "models").glob("*/model.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        found.append(struct.pack("<q", len(raw) - 8 - length) + raw[: 8 + length])
    text = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    for more in (b"", b" " * 7):
        found.append(struct.pack("<q", 24) + struct.pack("<Q", len(text + more)) + text + more)
    return [*found, struct.pack("<q", 0) + struct.pack("<Q", 2) + b"{}"]


def relength(content: bytes) -> bytes:
    """A header's input with the length that its text has, so that the text is looked at."""
    return content[:8] + struct.pack("<Q", max(0, len(content) - 16)) + content[16:]


def read_header_of(content: bytes, file: Path) -> None:
    """Write an input to a file, a hole for the tensors, and read its header as a run would."""
    from mergetool.errors import CheckpointError
    from mergetool.storage.header import read_header

    (data,) = struct.unpack("<q", content[:8].ljust(8, b"\0"))
    file.write_bytes(content[8:])
    size = len(content) - 8 + data
    if 0 <= size < 1 << 40:
        os.truncate(file, size)
    try:
        header = read_header(file)
    except CheckpointError as error:
        str(error).encode()
        return
    if header.file_size < 1 << 26:
        from safetensors import safe_open

        with safe_open(file, "numpy") as library:  # what we accept, the library does
            if set(library.keys()) != set(header.entries):
                raise Finding("the library finds other tensors")


def load_recipe_of(content: bytes) -> None:
    """Load an input as a recipe; one that loads must be able to say what it means."""
    from mergetool.errors import RecipeError
    from mergetool.recipe import load

    try:
        recipe = load(content)
    except RecipeError as error:
        if not error.problems:
            raise Finding("an error that names no problem") from error
        str(error).encode()
        return
    json.dumps(recipe.canonical())


def checker(target: str, folder: Path) -> Callable[[bytes], None]:
    """What feeds one input; anything but our own errors comes out."""

    def check(content: bytes) -> None:
        began = time.process_time()  # others may be busy on this machine
        if target == "header":
            read_header_of(content, folder / "fuzzed.safetensors")
        else:
            load_recipe_of(content)
        if (took := time.process_time() - began) > SLOWEST:
            raise Finding(f"took {took:.1f} seconds")

    return check


class Findings:
    """Keeps one input of each kind of failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: set[str] = set()

    def feed(self, check: Callable[[bytes], None], content: bytes) -> None:
        """Feed an input, and keep it if it is the first that fails like this."""
        try:
            check(content)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            kind = f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            if kind in self.kinds:
                return
            self.kinds.add(kind)
            self.folder.mkdir(parents=True, exist_ok=True)
            name = self.folder / hashlib.sha256(content).hexdigest()[:16]
            name.write_bytes(content)
            say(f"FOUND {kind}: {str(error)[:200]!r}; the input is {name}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def bound_memory() -> None:
    """Let the process take no more than it has now and ``MEMORY``: hostile inputs get a MemoryError."""
    if Path("/proc/self/statm").exists():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def mutate(numbers: random.Random, target: str, corpus: Sequence[bytes]) -> bytes:
    """A real input with a few changes."""
    content = numbers.choice(corpus)
    for _ in range(numbers.choice((1, 1, 2, 3, 8))):
        content = random_edit(numbers, target, corpus, content).on(content)[:LARGEST_INPUT]
    return relength(content) if target == "header" and numbers.random() < 0.7 else content


def own_loop(target: str, seconds: float, seed: int, findings: Findings, folder: Path) -> int:
    """Feed seeded changes of real inputs; how many."""
    check, corpus, numbers = checker(target, folder), corpus_of(target), random.Random(seed)
    for content in corpus:
        findings.feed(check, content)  # imports what is needed
    bound_memory()
    count, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        if count % 100 == 0:
            faulthandler.dump_traceback_later(HANGS, exit=True)
        findings.feed(check, mutate(numbers, target, corpus))
        count += 1
    faulthandler.cancel_dump_traceback_later()
    return count


def guided(target: str, seconds: float, seed: int, findings: Findings, folder: Path) -> None:
    """Let atheris change inputs towards code that no other has reached; never returns."""
    import atheris

    with atheris.instrument_imports(include=["mergetool", "yaml", "json"]):
        import mergetool.recipe
        import mergetool.storage.header  # noqa: F401
    check, corpus = checker(target, folder), corpus_of(target)
    seeds = folder / "corpus"
    seeds.mkdir()
    for number, content in enumerate(corpus):
        (seeds / str(number)).write_bytes(content)
        findings.feed(check, content)

    def change(content: bytes, largest: int, number: int) -> bytes:
        numbers = random.Random(number)
        if numbers.random() < 0.5:
            content = atheris.Mutate(content, largest)
        else:
            content = random_edit(numbers, target, corpus, content).on(content)
        return (relength(content) if target == "header" and numbers.random() < 0.5 else content)[:largest]

    options = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-timeout={HANGS}", f"-max_len={LARGEST_INPUT}"]
    options += [f"-rss_limit_mb={MEMORY >> 20}", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
    atheris.Setup(
        [sys.argv[0], *options, str(seeds)], lambda content: findings.feed(check, content), custom_mutator=change
    )
    atheris.Fuzz()


def guided_in_a_child(arguments: argparse.Namespace) -> tuple[int, int]:
    """Run atheris in a process that it may end as it likes; how many inputs it fed, and its exit code."""
    command = [sys.executable, "-m", __spec__.name, arguments.target, "--child"]
    command += [
        "--seconds",
        str(arguments.seconds),
        "--seed",
        str(arguments.seed),
        "--findings",
        str(arguments.findings),
    ]
    with subprocess.Popen(command, stdout=None, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        assert child.stderr is not None
        lines = list(child.stderr)
    counts = [line.split()[-1] for line in lines if line.startswith("stat::number_of_executed_units")]
    if child.returncode or not counts:
        say("".join(lines[-40:]))
    return int(counts[-1]) if counts else 0, child.returncode


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("header", "recipe"))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "atheris", "own"), default="auto")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir(), "mergetool-findings"))
    parser.add_argument("--replay", type=Path, help="feed this input alone, and show what comes out")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    findings = Findings(arguments.findings / arguments.target)
    with tempfile.TemporaryDirectory() as name:
        if arguments.replay:
            checker(arguments.target, Path(name))(arguments.replay.read_bytes())
            return 0
        if arguments.child:
            guided(arguments.target, arguments.seconds, arguments.seed, findings, Path(name))
    known = set(findings.folder.glob("*"))
    engine, began = arguments.engine, time.monotonic()
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "own"
    code = 0
    if engine == "atheris":
        count, code = guided_in_a_child(arguments)
    else:
        with tempfile.TemporaryDirectory() as name:
            count = own_loop(arguments.target, arguments.seconds, arguments.seed, findings, Path(name))
    found = sorted({*findings.folder.glob("*")} - known)
    took = time.monotonic() - began
    pace = f"{count:,} inputs in {took:.0f} s, {count / took:,.0f} a second"
    say(f"{arguments.target} by {engine}: {pace}, {len(found)} kinds of failure")
    return 1 if found or code or findings.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
