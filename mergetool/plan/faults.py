"""What is wrong with a recipe for its models, collected so that it is all reported at once."""

from __future__ import annotations

from collections.abc import Iterable

from mergetool.errors import (
    CheckpointError,
    MergetoolError,
    MissingTensor,
    PlanError,
    Problem,
    RecipeError,
    ShapeMismatch,
)

Kind = type[MergetoolError]
SHOWN = 5
"""Names listed of many that have the same fault."""


class Faults:
    """Problems of several kinds; which kind is raised is decided by the most basic among them."""

    order: tuple[Kind, ...] = (RecipeError, CheckpointError, MissingTensor, ShapeMismatch, PlanError)

    def __init__(self) -> None:
        self._found: dict[Problem, Kind] = {}

    def add(self, kind: Kind, problems: Iterable[Problem]) -> None:
        """Note problems of one kind; one that was noted before counts once."""
        for problem in problems:
            self._found.setdefault(problem, kind)

    def __bool__(self) -> bool:
        return bool(self._found)

    def error(self) -> MergetoolError:
        """The error that carries them all."""
        kind = min(self._found.values(), key=self.order.index)
        return kind(self._found)

    def check(self) -> None:
        """Raise :meth:`error` if there is anything wrong."""
        if self:
            raise self.error()


def listed(names: Iterable[str]) -> str:
    """A few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:SHOWN]) + more
