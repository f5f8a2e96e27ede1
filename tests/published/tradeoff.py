"""What a sentence encoder knows of two dictionaries, and of its fine-tune's domain.

Two retrieval tasks of 500 queries each, whose candidates are the 500 answers:

    WordNet   gloss → word, nouns: the first word of a synset for the gloss without its examples
    FOLDOC    definition → headword: the first sentence, without markup and with the headword replaced by "it"

Both are scored by mean reciprocal rank. The third number is the mean cosine over the two pairs that the fine-tune's
package page shows as similar. Of all queries those with the smallest sha256 are asked: a sample that is the same for
every version of Python, and into which an entry's neighbours do not come. The dictionaries come out of Debian packages
by pinned version and sha256; nothing of them is kept but in the cache.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import string
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

QUERIES = 500
SHORTEST = 8  # words that a computing definition needs, to leave out "See X"
BATCH = 32
LONGEST = 256  # tokens; both models' `max_seq_length`
SECONDS = 300

CARD_PAIRS = (("pod keeps crashing", "CrashLoopBackOff"), ("mean time to recover", "MTTR"))


class UnavailableError(Exception):
    """A dictionary that is not there and cannot be fetched; the message says why."""


@dataclass(frozen=True)
class Package:
    """A Debian package: its name and version for apt, its file's name and sha256."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


WORDNET = Package("wordnet-base", "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752")
FOLDOC = Package("dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3")


@dataclass(frozen=True)
class Task:
    """Queries and their answers, one of each in every place."""

    queries: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """What :func:`measure` finds."""

    wordnet: float
    foldoc: float
    card: float


# The dictionaries ---------------------------------------------------------------------------------------


def fetch(package: Package, cache: Path) -> Path:
    """The unpacked folder of a Debian package: downloaded by apt-get on first use, its sha256 compared every time.

    Raises:
        UnavailableError: there is no apt-get or dpkg-deb, apt knows no such version, or the file is another one.
    """
    if missing := [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]:
        raise UnavailableError(f"{missing[0]} is not installed, so {package.file} cannot be had")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        archive = download(package, cache)
        folder = archive.with_suffix("")
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                subprocess.run(["dpkg-deb", "-x", str(archive), f"{scratch}/{folder.name}"], check=True)
                Path(scratch, folder.name).rename(folder)
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{package.file} could not be fetched: {error}") from error
    return folder


def download(package: Package, cache: Path) -> Path:
    """The package's file, compared with its sha256."""
    archive = cache / package.file
    command = ["apt-get", "download", f"{package.name}={package.version}"]
    if not archive.exists():
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode or not archive.exists():
            raise UnavailableError(f"`{' '.join(command)}` gave no {package.file}: {done.stderr.strip()[-300:]}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise UnavailableError(f"{archive} has sha256 {found}, not {package.sha256}: delete it")
    return archive


def wordnet(folder: Path) -> Task:
    """Gloss → word. A line of `data.noun` is `offset file n count word lex_id … | gloss; "example"; …`."""
    entries: list[tuple[str, str]] = []
    for line in (folder / "usr/share/wordnet/data.noun").read_text(encoding="ascii").splitlines():
        if not line.startswith(" "):  # the licence stands in front, indented
            fields, _, gloss = line.partition("|")
            word = fields.split()[4].replace("_", " ")
            entries.append((re.split(r'(?:^|;)\s*"', gloss.strip())[0].strip(), word))
    return sample(entries)


def foldoc(folder: Path) -> Task:
    """Definition → headword."""
    entries: list[tuple[str, str]] = []
    for heads, body in foldoc_entries(folder / "usr/share/dictd"):
        text = re.sub(r"^(?:(?:\d+\.|<[^>]*>|/[^/]*/)\s*)*", "", body)  # sense numbers, labels, pronunciation
        text = re.split(r"\.(?= [A-Z])|\.$", text.translate(str.maketrans("", "", "{}")))[0]
        if len(text.split()) >= SHORTEST:
            for head in sorted(heads, key=len, reverse=True):
                text = re.sub(rf"(?<!\w){re.escape(head)}(?!\w)", "it", text, flags=re.IGNORECASE)
            entries.append((text, heads[0]))
    return sample(entries)


def foldoc_entries(folder: Path) -> Iterator[tuple[list[str], str]]:
    """The headwords and the text of every entry; each line of the index is `word TAB offset TAB length`."""
    text = gzip.decompress((folder / "foldoc.dict.dz").read_bytes())
    index = (folder / "foldoc.index").read_text(encoding="utf-8").splitlines()
    for start, length in sorted({(base64(line.split("\t")[1]), base64(line.split("\t")[2])) for line in index}):
        heads, _, body = text[start : start + length].decode("utf-8").partition("\n\n")
        if not heads.startswith(("00-database", " ")):
            yield [head.strip() for head in heads.split("\n")], " ".join(body.split())


def base64(number: str) -> int:
    """A number as dictd's index writes it: base 64, most significant digit first."""
    digits = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    value = 0
    for digit in number:
        value = value * 64 + digits.index(digit)
    return value


def sample(entries: Sequence[tuple[str, str]]) -> Task:
    """The entries, (query, answer), whose queries have the smallest sha256; of equal queries the first."""
    distinct = dict(reversed(entries))
    chosen = sorted(distinct, key=lambda query: hashlib.sha256(query.encode()).digest())[:QUERIES]
    return Task(tuple(chosen), tuple(distinct[query] for query in chosen))


# The encoder --------------------------------------------------------------------------------------------


class Encoder:
    """A model folder as sentence-transformers would run it: mean over the tokens, then length one."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """One row for each text; texts of about one length share a batch, so that little is padded."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            tokens = self.tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            mask = tokens["attention_mask"].unsqueeze(-1)
            with torch.inference_mode():
                states = self.model(**tokens).last_hidden_state
            rows[batch] = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(rows, dim=-1)


def mean_reciprocal_rank(queries: torch.Tensor, answers: torch.Tensor) -> float:
    """The mean of 1 / rank of each query's own answer among all of them, by cosine."""
    cosines = queries @ answers.T
    rank = 1 + (cosines > cosines.diagonal().unsqueeze(1)).sum(1)
    return float((1 / rank).mean())


def measure(folder: Path, words: Task, terms: Task) -> Scores:
    """Score the encoder in a model folder."""
    encode = Encoder(folder)
    left, right = (encode([pair[side] for pair in CARD_PAIRS]) for side in (0, 1))
    return Scores(
        wordnet=mean_reciprocal_rank(encode(words.queries), encode(words.answers)),
        foldoc=mean_reciprocal_rank(encode(terms.queries), encode(terms.answers)),
        card=float((left * right).sum(1).mean()),
    )
