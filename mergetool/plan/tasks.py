"""A model for each task: a plan whose recipe corrects towards every task's own model, as one plan for each."""

from __future__ import annotations

from dataclasses import replace

from mergetool.errors import PlanError
from mergetool.plan.digest import digest
from mergetool.plan.work import Plan


def tasks(plan: Plan) -> tuple[Plan, ...]:
    """The plans of the models that a plan stands for: itself, or where every task has a model of its own, one for each.

    The model of a task goes into a folder of its name in the plan's output.
    """
    if plan.correction is None or not several(plan):
        return (plan,)
    return tuple(of_task(plan, task.name) for task in plan.correction.tasks)


def several(plan: Plan) -> bool:
    """Whether a plan stands for a model of each task, rather than for one."""
    correct = plan.recipe.correct
    folded = correct is not None and correct.method == "tact" and correct.fold == "per_task"
    return plan.correction is not None and folded and not plan.task


def of_task(plan: Plan, name: str) -> Plan:
    """The plan of one task's model.

    Raises:
        PlanError: the recipe has no model of that task.
    """
    found = [task for task in plan.correction.tasks if task.name == name] if plan.correction is not None else []
    if not found or plan.correction is None:
        raise PlanError(f"the recipe makes no model of the task `{name}`")
    return replace(
        plan,
        correction=replace(plan.correction, tasks=tuple(found)),
        task=name,
        digest=digest(plan.recipe, plan.sources, plan.shards, plan.data, name),
        output=None if plan.output is None else plan.output / name,
    )
