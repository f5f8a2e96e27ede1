"""Text to meaning: schema, settings, load with line and column."""

from mergetool.recipe.editor import schema
from mergetool.recipe.load import load, read
from mergetool.recipe.recipe import Recipe, Resolved, Source
from mergetool.recipe.rules import Rule, Where
from mergetool.recipe.settings import UNSET, Condition, Setting, evaluate
from mergetool.recipe.usage import Usage

__all__ = [
    "UNSET",
    "Condition",
    "Recipe",
    "Resolved",
    "Rule",
    "Setting",
    "Source",
    "Usage",
    "Where",
    "evaluate",
    "load",
    "read",
    "schema",
]
