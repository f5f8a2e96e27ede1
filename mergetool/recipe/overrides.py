"""Changes to a recipe from outside its file, such as ``models.0.parameters.weight=0.3``."""

from __future__ import annotations

from mergetool.errors import Problem
from mergetool.recipe.draft import Draft, title
from mergetool.recipe.text import parse
from mergetool.recipe.tree import Node, Path


def override(draft: Draft, text: str) -> None:
    """Set one value of the tree; what is wrong with the override becomes a problem of the draft.

    Args:
        draft: the recipe; its tree is changed.
        text: dotted keys and list indices, ``=``, and a value in YAML.
    """
    place = f"--set {text}"
    dotted, equals, written = text.partition("=")
    steps = [step.strip() for step in dotted.split(".")]
    if not equals or not all(steps):
        fix = "write it like `parameters.normalize=false` or `models.0.parameters.weight=0.3`"
        return draft.add(Problem("an override must be a dotted path, `=` and a value", place, fix))
    value, problems = parse(written, place, place)
    for problem in problems:
        draft.add(problem)
    if problems:
        return None
    value = value or Node(None, place)
    value.key = place
    return _put(draft, steps, value, place)


def _put(draft: Draft, steps: list[str], value: Node, place: str) -> None:
    node: Node = draft.root
    path: Path = ()
    for i, word in enumerate(steps):
        step = _step(node, word)
        what = _refusal(node, step, path)
        if what:
            return draft.add(Problem(what, place, _advice(node)))
        path = (*path, step)
        if i == len(steps) - 1:
            _set(node, step, value)
            return None
        below = node.child(step)
        if below is None or below.value is None:
            below = Node({}, place, place)
            _set(node, step, below)
        node = below
    return None


def _step(node: Node, word: str) -> str | int:
    number = isinstance(node.value, list) and word.isascii() and word.isdigit() and len(word) < 10
    return int(word) if number else word


def _set(node: Node, step: str | int, value: Node) -> None:
    if isinstance(node.value, dict):
        node.value[str(step)] = value
    elif isinstance(node.value, list) and isinstance(step, int):
        node.value[step] = value


def _refusal(node: Node, step: str | int, path: Path) -> str:
    if isinstance(node.value, list):
        return "" if node.child(step) else f"{title(path)} has no entry `{step}`"
    return "" if isinstance(node.value, dict) else f"{title(path)} is a single value, so it has no `{step}`"


def _advice(node: Node) -> str:
    if isinstance(node.value, list):
        return f"its entries are numbered 0 to {len(node.value) - 1}" if node.value else "it is empty"
    return "leave out what follows"
