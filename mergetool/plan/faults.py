"""What is wrong with a recipe for its models, collected so that it is all reported at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mergetool.errors import (
    CheckpointError,
    MergetoolError,
    MissingTensor,
    OutputRefused,
    PlanError,
    Problem,
    RecipeError,
    ShapeMismatch,
)

Kind = type[MergetoolError]
SHOWN = 5
"""Names listed of many that have the same fault."""


TENSORS, TENSOR = "{tensors}", "{tensor}"
"""Where a problem that many tensors may have names them, or the first of them."""


@dataclass(frozen=True)
class _Fault:
    """What kind of problem it is, and the tensors that have it if it is one of tensors."""

    kind: Kind
    tensors: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def told(self, problem: Problem) -> Problem:
        if not self.tensors:
            return problem
        names, detail = listed(dict.fromkeys(self.tensors)), self.details[0]
        if detail and len(set(self.details)) > 1:
            detail += f" (of `{self.tensors[0]}`)"
        what, fix = (s.replace(TENSORS, names).replace(TENSOR, self.tensors[0]) for s in (problem.what, problem.fix))
        return replace(problem, what=f"{what}: {detail}" if detail else what, fix=fix)


class Faults:
    """Problems of several kinds; which kind is raised is decided by the most basic among them."""

    order: tuple[Kind, ...] = (RecipeError, CheckpointError, MissingTensor, ShapeMismatch, PlanError, OutputRefused)

    def __init__(self) -> None:
        self._found: dict[Problem, _Fault] = {}

    def add(self, kind: Kind, problems: Iterable[Problem]) -> None:
        """Note problems of one kind; one that was noted before counts once."""
        for problem in problems:
            self._found.setdefault(problem, _Fault(kind))

    def of_tensor(self, kind: Kind, problem: Problem, tensor: str, detail: str = "") -> None:
        """Note what is wrong with one tensor; where only the tensor differs, it becomes one problem of them all.

        Args:
            kind: the kind of problem.
            problem: with :data:`TENSORS` in its text where their names go, and :data:`TENSOR` for the first alone.
            tensor: the tensor's name.
            detail: what to add of the first tensor, if it is not the same for all.
        """
        fault = self._found.setdefault(problem, _Fault(kind))
        fault.tensors.append(tensor)
        fault.details.append(detail)

    def __bool__(self) -> bool:
        return bool(self._found)

    def error(self) -> MergetoolError:
        """The error that carries them all."""
        kind = min((fault.kind for fault in self._found.values()), key=self.order.index)
        return kind([fault.told(problem) for problem, fault in self._found.items()])

    def check(self) -> None:
        """Raise :meth:`error` if there is anything wrong."""
        if self:
            raise self.error()


def listed(names: Iterable[str]) -> str:
    """A few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:SHOWN]) + more
