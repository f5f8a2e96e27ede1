"""Everything that makes a folder of shards a model folder: index, config, tokenizer, card, recipe, provenance."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mergetool.checkpoint.layout import is_tokenizer
from mergetool.plan import Plan
from mergetool.publish.card import card
from mergetool.publish.config import with_changes, with_dtype
from mergetool.publish.local import write_local
from mergetool.publish.page import Drawn
from mergetool.publish.privacy import Privacy
from mergetool.publish.provenance import PROVENANCE, RECIPE, provenance
from mergetool.storage.shards import index
from mergetool.storage.writer import atomic_write


def publish(
    plan: Plan,
    folder: Path,
    digests: Mapping[str, str],
    notes: Sequence[str] = (),
    beside: Mapping[str, bytes] = MappingProxyType({}),
    report: Drawn | None = None,
) -> None:
    """Write everything of the model folder but the shards; the same plan gives the same bytes.

    Args:
        plan: what was run.
        folder: where the shards are.
        digests: the digest of every output tensor, by name.
        notes: what the run has to say besides the plan's own notes.
        beside: further files by their names in the folder, such as corrections of tasks.
        report: the run's report, if it has one.

    Raises:
        CheckpointError: a source's file cannot be read or fetched.
        RunError: the disk is full or fails.
    """
    privacy = Privacy.of(plan)
    said = tuple(privacy.hide(note) for note in dict.fromkeys((*plan.notes, *notes)))
    written: dict[str, str] = {}

    def write(name: str, content: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
        written[name] = hashlib.sha256(content).hexdigest()

    for name, content in (*_carried(plan), *sorted(beside.items())):
        write(name, content)
    if len(plan.shards) > 1:
        stem = re.sub(r"-\d+-of-\d+\.safetensors$", "", plan.shards[0].file)
        write(f"{stem}.safetensors.index.json", (json.dumps(index(plan.shards), indent=2) + "\n").encode())
    write(RECIPE, privacy.hide(plan.recipe.text).encode())
    report = report or Drawn()
    for name, content in report.files.items():
        write(name, content)
    write("README.md", card(plan, frozenset(written), said, privacy, report.pictures).encode())
    write_local(plan, folder)
    record = provenance(plan, digests, written, said, privacy)
    atomic_write(folder / PROVENANCE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _carried(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """The files that come from the sources: the lender's, but the tokenizer's from whose tokenizer is taken."""
    lender = plan.sources[plan.lender].checkpoint
    tokenizer = plan.sources[plan.tokenizer].checkpoint
    for name in lender.files:
        if name in (PROVENANCE, RECIPE) or (tokenizer is not lender and is_tokenizer(name)):
            continue
        content = lender.companion(name)
        assert content is not None  # it is one of the files
        if name == "config.json":
            content = with_changes(with_dtype(content, plan.recipe.stored_dtype), plan.config)
        yield name, content
    if tokenizer is not lender:
        for name in filter(is_tokenizer, tokenizer.files):
            content = tokenizer.companion(name)
            assert content is not None
            yield name, content
