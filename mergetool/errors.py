"""Every exception, as a tree; a message says what is wrong, where, and what to do.

MergetoolError
├── RecipeError        the text is wrong                                            exit code 2
├── CheckpointError    a model cannot be found or read                              exit code 3
│   ├── HeaderError        a safetensors file breaks the format
│   ├── MissingTensor      a source lacks a tensor that others have
│   └── ShapeMismatch      sources disagree on a tensor's shape
├── PlanError          the recipe is right, but not for these models or this machine   exit code 3
└── RunError           it was all right and still failed                            exit code 4
    ├── NonFinite          a NaN or an infinity among the numbers
    ├── OutputRefused      the output exists, is locked or cannot be written
    └── SourceChanged      a source file changed while it was read
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``what`` it is, ``where`` it stands, and how to ``fix`` it."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n    {self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"


class MergetoolError(Exception):
    """The root of the tree: carries every :class:`Problem` found, so that all are reported at once.

    Args:
        what: the message of a single problem, or all the problems.
        where: the place of a single problem: ``file:line:column``, a path, a tensor.
        fix: what the user can do about a single problem.
    """

    exit_code = 1

    def __init__(self, what: str | Problem | Iterable[Problem], where: str = "", fix: str = "") -> None:
        if isinstance(what, str):
            what = Problem(what, where, fix)
        self.problems: tuple[Problem, ...] = (what,) if isinstance(what, Problem) else tuple(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[MergetoolError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class RecipeError(MergetoolError):
    """The text of the recipe is wrong."""

    exit_code = 2


class CheckpointError(MergetoolError):
    """A model cannot be found or read."""

    exit_code = 3


class HeaderError(CheckpointError):
    """A safetensors file breaks the format."""


class MissingTensor(CheckpointError):
    """A source lacks a tensor that others have."""


class ShapeMismatch(CheckpointError):
    """Sources disagree on the shape of a tensor."""


class PlanError(MergetoolError):
    """The recipe is right, but not for these models or this machine."""

    exit_code = 3


class RunError(MergetoolError):
    """Everything was right and the run still failed."""

    exit_code = 4


class NonFinite(RunError):
    """A NaN or an infinity among the numbers read or made."""


class OutputRefused(RunError):
    """The output folder exists, is locked by another run, or cannot be written."""


class SourceChanged(RunError):
    """A source file changed between planning and reading."""
