"""What a model folder remembers for this machine alone: the recipe as run, with its paths. Not for publication."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetool.plan import Plan
from mergetool.storage.writer import atomic_write

FOLDER = ".mergetool"
"""The name in a model folder of the folder that stays here."""
LOCAL = f"{FOLDER}/local.json"
"""Where the private record is, seen from the model folder."""


@dataclass(frozen=True)
class Local:
    """The private record of a model folder."""

    recipe: dict[str, Any]
    """What the recipe means, its sources named as it names them."""
    text: str
    """The recipe as run."""
    recipe_folder: Path | None
    """Where the recipe's relative paths start from; None for a recipe that was no file."""


def write_local(plan: Plan, folder: Path) -> None:
    """Write the private record of a plan, and keep git from taking it along.

    Raises:
        RunError: the disk is full or fails.
    """
    home = plan.recipe.folder
    content = {
        "recipe": plan.recipe.canonical(),
        "text": plan.recipe.text,
        "recipe_folder": None if home is None else str(home.resolve()),
    }
    (folder / FOLDER).mkdir(exist_ok=True)
    atomic_write(folder / FOLDER / ".gitignore", "*\n")
    atomic_write(folder / LOCAL, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_local(folder: Path) -> Local | None:
    """The private record of a model folder; None where it was not kept or cannot be read."""
    try:
        found = json.loads((folder / LOCAL).read_bytes())
        recipe, text, home = found["recipe"], found["text"], found["recipe_folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(recipe, dict) or not isinstance(text, str) or not isinstance(home, str | None):
        return None
    return Local(recipe, text, None if home is None else Path(home))
