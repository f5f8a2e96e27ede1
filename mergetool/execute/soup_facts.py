"""How the trying of a soup is kept as facts: the scores of every mean by the numbers of its models, and the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.execute.fact_folder import Facts
from mergetool.execute.fact_making import Making
from mergetool.facts.soup import Members, Soup
from mergetool.plan.stages import CHOSEN

_MEMBERS = "members"
"""The field that holds which models the soup is made of, the best first."""


@dataclass(frozen=True)
class Tried:
    """What was tried for a soup.

    Attributes:
        metric: what the scores are.
        scores: of each mean on each of the data, in the order in which they were tried.
        soup: what was chosen, and the mean score of all that was tried.
    """

    metric: str
    scores: Mapping[Members, NDArray[np.float64]]
    soup: Soup


def name_of(members: Members) -> str:
    """What the scores of a mean are kept under: the numbers of its models, from 1 on."""
    return "+".join(str(i + 1) for i in members)


def add_choice(soup: Soup, found: Making) -> None:
    """Write down what was chosen."""
    order = [soup.best, *(i for i in soup.members if i != soup.best)]
    found.add(CHOSEN, {f"{CHOSEN}:{_MEMBERS}": np.array(order, np.int64)}, {})


def read_tried(facts: Facts) -> Tried:
    """What a finished folder of facts says of a soup."""
    best, *others = (int(i) for i in facts.get(CHOSEN, _MEMBERS))
    kept = [key.rpartition(":") for key in facts.entries if key != f"{CHOSEN}:{_MEMBERS}"]
    scores = {_members(name): _flat(facts.get(name, metric)) for name, _, metric in kept}
    tried = {members: float(each.mean()) for members, each in scores.items()}
    return Tried(kept[0][2], scores, Soup(tuple(sorted((best, *others))), best, tried))


def _members(name: str) -> Members:
    return tuple(int(number) - 1 for number in name.split("+"))


def _flat(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64).reshape(-1)
