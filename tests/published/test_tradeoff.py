"""Task arithmetic walks from a published base to its fine-tune as independently measured: what is gained, what is lost.

The reference was measured apart from mergetool, by the same three numbers over queries of the same kind. Which 500 it
asked is not known, so the retrieval scores agree up to their sampling noise (about .02) and up to how a definition is
cut, while the card pairs are the very same.
"""

import sys
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import pytest

import mergetool

from . import tradeoff
from .conftest import Published, script

pytestmark = pytest.mark.slow

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
REFERENCE = {
    0.0: tradeoff.Scores(wordnet=0.557, foldoc=0.358, card=0.209),
    0.25: tradeoff.Scores(wordnet=0.558, foldoc=0.337, card=0.361),
    0.5: tradeoff.Scores(wordnet=0.510, foldoc=0.297, card=0.652),
    0.75: tradeoff.Scores(wordnet=0.408, foldoc=0.220, card=0.900),
    1.0: tradeoff.Scores(wordnet=0.280, foldoc=0.151, card=0.967),
}

Table = dict[float, tradeoff.Scores]


@pytest.fixture(scope="module")
def dictionaries() -> tuple[tradeoff.Task, tradeoff.Task]:
    cache = script().cache().parent / "debian"
    try:
        words, terms = (tradeoff.fetch(package, cache) for package in (tradeoff.WORDNET, tradeoff.FOLDOC))
    except tradeoff.UnavailableError as error:
        pytest.skip(str(error))
    return tradeoff.wordnet(words), tradeoff.foldoc(terms)


@pytest.fixture(scope="module")
def measured(
    published: Published,
    dictionaries: tuple[tradeoff.Task, tradeoff.Task],
    tmp_path_factory: pytest.TempPathFactory,
) -> Table:
    """The scores of `task-arithmetic.yaml` at every α."""
    home = tmp_path_factory.mktemp("tradeoff")
    return {alpha: tradeoff.measure(merge(published, alpha, home), *dictionaries) for alpha in ALPHAS}


def merge(published: Published, alpha: float, home: Path) -> Path:
    recipe = published.recipe("task-arithmetic", f"models.0.parameters.weight={alpha}")
    return mergetool.run(mergetool.build(recipe), home / str(alpha)).output


def shown(table: Table) -> str:
    """The table, each score beside its reference."""
    lines = ["", f"{'α':<6}" + "".join(f"{name:<16}" for name in ("WordNet", "FOLDOC", "card pairs"))]
    for alpha, scores in table.items():
        pairs = zip(astuple(scores), astuple(REFERENCE[alpha]), strict=True)
        lines.append(f"{alpha:<6}" + "".join(f"{f'{here:.3f} ({there:.3f})':<16}" for here, there in pairs))
    return "\n".join([*lines, "(in brackets: the reference)", ""])


def test_the_queries_are_as_described(dictionaries: tuple[tradeoff.Task, tradeoff.Task]) -> None:
    words, terms = dictionaries
    for task in dictionaries:
        assert len(task.queries) == len(set(task.queries)) == len(task.answers) == tradeoff.QUERIES
    assert not any('"' in gloss[:1] or "_" in word for gloss, word in zip(words.queries, words.answers, strict=True))
    for definition, head in zip(terms.queries, terms.answers, strict=True):
        assert f" {head.lower()} " not in f" {definition.lower()} "


def test_the_cards_pairs_come_together_as_in_the_reference(measured: Table, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(shown(measured))
    for alpha, scores in measured.items():
        assert scores.card == pytest.approx(REFERENCE[alpha].card, abs=0.002), alpha


@pytest.mark.parametrize("task", ["wordnet", "foldoc"])
def test_general_knowledge_is_lost_as_in_the_reference(task: str, measured: Table) -> None:
    here = {alpha: getattr(scores, task) for alpha, scores in measured.items()}
    there = {alpha: getattr(scores, task) for alpha, scores in REFERENCE.items()}
    for alpha in ALPHAS:
        assert here[alpha] == pytest.approx(there[alpha], abs=0.06), alpha
        assert here[alpha] - here[0.0] == pytest.approx(there[alpha] - there[0.0], abs=0.05), alpha
    assert here[0.25] > here[0.0] - 0.03, "a quarter of the way costs next to nothing"
    for less, more in pairwise(ALPHAS[1:]):
        assert here[less] > here[more], (less, more)
