"""The recipe's models, opened: headers and configs, nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from mergetool.anatomy import anatomy
from mergetool.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mergetool.errors import CheckpointError, Problem
from mergetool.plan.work import Source
from mergetool.recipe import Recipe

OPENED_AT_ONCE = 8
"""Repos asked for at the same time: opening is waiting for the Hub."""


def references(recipe: Recipe) -> tuple[str, ...]:
    """Every model that has to be opened: those that are merged, and a base that only lends its files."""
    merged = recipe.sources
    base = recipe.base_model
    return merged if base is None or base in merged else (base, *merged)


def place(recipe: Recipe, reference: str) -> str:
    """Where in its text the recipe names a model."""
    for i, model in enumerate(recipe.models):
        if model.reference == reference:
            return recipe.where("models", i, "model")
    return recipe.where("base_model")


def open_sources(recipe: Recipe) -> tuple[tuple[Source, ...], list[Problem]]:
    """Open every model of a recipe, all problems with them collected; opened are those without."""

    def attempt(reference: str) -> Checkpoint | CheckpointError:
        try:
            return open_checkpoint(reference, recipe.folder)
        except CheckpointError as error:
            return error

    opened: list[Source] = []
    problems: list[Problem] = []
    names = references(recipe)
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        for reference, result in zip(names, pool.map(attempt, names), strict=True):
            if isinstance(result, CheckpointError):
                problems += [_at(problem, place(recipe, reference)) for problem in result.problems]
            else:
                shapes = {name: tensor.shape for name, tensor in result.tensors.items()}
                opened.append(Source(reference, result, anatomy(result.config, shapes)))
    return tuple(opened), problems


def _at(problem: Problem, where: str) -> Problem:
    place = f"{where}: {problem.where}" if problem.where else where
    return Problem(problem.what, place, problem.fix)
