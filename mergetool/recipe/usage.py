"""Which filters and rules of a recipe met a tensor, so that the others can be reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mergetool.recipe.settings import Condition, Setting
from mergetool.recipe.tree import Path

if TYPE_CHECKING:
    from mergetool.recipe.recipe import Recipe
    from mergetool.recipe.rules import Rule


class Usage:
    """Collects, while tensors are asked about, what of the recipe is used."""

    def __init__(self, recipe: Recipe) -> None:
        self._filters = dict(_filters(recipe))
        self._rules = {rule.path for rule in recipe.rules}

    def saw(self, name: str) -> None:
        """Note that there is a tensor of this name."""
        for path in [path for path, condition in self._filters.items() if condition.matches(name)]:
            del self._filters[path]

    def chose(self, rule: Rule) -> None:
        """Note that a rule was the first to match a tensor."""
        self._rules.discard(rule.path)

    def filters_unused(self) -> list[Path]:
        """The paths of the filters that match none of the names seen."""
        return list(self._filters)

    def rules_unused(self) -> list[Path]:
        """The paths of the rules that were first for no tensor."""
        return sorted(self._rules)


def _filters(recipe: Recipe) -> Iterable[tuple[Path, Condition]]:
    for path, settings in levels(recipe):
        for parameter, setting in settings.items():
            for condition in setting:
                if not condition.everywhere:
                    yield (*path, parameter, *condition.path, "filter"), condition


def levels(recipe: Recipe) -> Iterable[tuple[Path, Mapping[str, Setting]]]:
    """Every mapping of parameters in a recipe, with its path."""
    yield ("parameters",), recipe.parameters
    for i, source in enumerate(recipe.models):
        yield ("models", i, "parameters"), source.parameters
    for rule in recipe.rules:
        yield (*rule.path, "parameters"), rule.parameters or {}
        for i, settings in enumerate((rule.models or {}).values()):
            yield (*rule.path, "models", i, "parameters"), settings
