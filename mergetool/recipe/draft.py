"""A recipe under examination: its tree, what is wrong with it, and the mending that lets it go on."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mergetool.errors import Problem
from mergetool.recipe.spelling import did_you_mean, nearest
from mergetool.recipe.tree import Node, Path, shorten

MOST_PROBLEMS = 100
"""More problems than this are not told."""


class Draft:
    """The tree of a recipe, mended where it is wrong so that everything wrong is found in one go."""

    def __init__(self, root: Node, problems: Iterable[Problem] = ()) -> None:
        self.root = root
        self.dropped: list[Path] = []
        """What was removed because no meaning could be found in it."""
        self.unclear: list[Path] = []
        """Rules that were reported and have no meaning, to be removed once all rules were looked at."""
        self.faulty: set[str] = set()
        """Parameters that were reported as missing, or as not going together with others."""
        self._problems: list[Problem] = []
        self._more = False
        for problem in problems:
            self.add(problem)

    @property
    def full(self) -> bool:
        """Whether there are so many problems that looking for more is of no use."""
        return len(self._problems) >= MOST_PROBLEMS

    @property
    def problems(self) -> list[Problem]:
        """All problems in the order of the text."""
        found = sorted(dict.fromkeys(self._problems), key=_line_and_column)
        return [*found, Problem("there are more problems than these")] if self._more else found

    def add(self, problem: Problem) -> None:
        """Take down a problem."""
        if self.full:
            self._more = True
        else:
            self._problems.append(problem)

    def report(self, path: Path, what: str, fix: str = "", key: bool = False) -> None:
        """Take down what is wrong with the value at a path, or with its key."""
        node = self.root.nearest(path)
        self.add(Problem(what, (key and node.key) or node.place, fix))

    def unknown_key(self, path: Path, what: str, names: Iterable[str]) -> None:
        """Report an unknown key; read it as the nearest name if that is free, else remove it."""
        names = list(names)
        word = str(path[-1])
        self.report(path, what, "" if self.full else did_you_mean(word, names), key=True)
        mapping = self.root.nearest(path[:-1]).value
        near = None if self.full else nearest(word, names)
        if near and isinstance(mapping, dict) and near not in mapping:
            mapping[near] = mapping.pop(word)
        else:
            self.drop(path)

    def drop(self, path: Path) -> None:
        """Remove what is at a path."""
        self.dropped.append(path)
        parent = self.root.nearest(path[:-1]).value
        last = path[-1]
        if isinstance(parent, dict):
            parent.pop(str(last), None)
        elif isinstance(parent, list) and isinstance(last, int) and last < len(parent):
            parent.pop(last)


def title(path: Path) -> str:
    """A path as the subject of a sentence."""
    if not path:
        return "the recipe"
    last = path[-1]
    if isinstance(last, str):
        return f"`{shorten(last)}`"
    return f"entry {last + 1} of {title(path[:-1])}"


def _line_and_column(problem: Problem) -> tuple[int, int]:
    place = re.search(r":(\d+):(\d+)$", problem.where)
    return (int(place[1]), int(place[2])) if place else (0, 0)
