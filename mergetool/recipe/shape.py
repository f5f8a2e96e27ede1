"""The shape of a recipe, examined: Pydantic's errors as our own sentences, each with its place."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from mergetool.recipe import entries, references, stages
from mergetool.recipe.catalogue import methods
from mergetool.recipe.draft import MOST_PROBLEMS, Draft, title
from mergetool.recipe.tree import Node, Path, shorten

ROUNDS = 12
"""How often a mended recipe is examined again; every round mends something."""

_ENTRIES: dict[str, type[references.Strict]] = {
    "models": entries.SourceEntry,
    "rules": entries.RuleEntry,
    "where": entries.WhereEntry,
    "base_model": references.ReferenceEntry,
    "tokenizer_source": references.ReferenceEntry,
    "keep": references.ReferenceEntry,
    "lora": references.PathEntry,
    "calibration": stages.CalibrationEntry,
    "align": stages.AlignEntry,
    "reference": references.ReferenceEntry,
    "correct": stages.CorrectEntry,
    "train": stages.TrainEntry,
    "evaluate": stages.EvaluateEntry,
    "report": stages.ReportEntry,
}
_MUST_BE = {
    "model_type": "a mapping of names to values",
    "model_attributes_type": "a mapping of names to values",
    "dict_type": "a mapping of names to values",
    "list_type": "a list",
    "string_type": "text",
    "int_type": "a whole number",
    "bool_type": "true or false",
}
_INSTEAD = {
    "slices": "where its ranges cover all layers, list the models under `models` instead",
}
"""What to do about a key that is not supported, other than to remove it."""
_SENTENCES = {
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "greater_than_equal": "must not be negative",
    "less_than": "must be below 2⁶⁴",
}


def examine(draft: Draft) -> entries.Document | None:
    """Report and mend everything wrong with keys and shapes; None where nothing can be made of the rest."""
    if not isinstance(draft.root.value, dict):
        draft.report((), f"a recipe must be {_MUST_BE['dict_type']}", "begin with `merge_method: …`")
        return None
    for _ in range(ROUNDS):
        if draft.full:
            return None
        try:
            return entries.Document.model_validate(draft.root.plain())
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
        found = [(_path(draft.root, item["loc"]), item) for item in errors[: 2 * MOST_PROBLEMS]]
        unknown = [path for path, item in found if item["type"] == "extra_forbidden"]
        for path in unknown:
            _unknown_key(draft, path)
        if not unknown and not _values(draft, found):
            return None
    return None


def _path(root: Node, steps: tuple[int | str, ...]) -> Path:
    """The path in the text for the path of an error, which also names the branches of unions."""
    path: list[str | int] = []
    node: Node | None = root
    for step in steps:
        below = node.child(step) if node else None
        if below is None and str(step).startswith(references.TAG):
            continue
        path.append(step)
        node = below
    return tuple(path)


def _unknown_key(draft: Draft, path: Path) -> None:
    word = str(path[-1])
    names = list(_entry(draft, path[:-1]).model_fields)
    parameter = any(word in method.parameters for method in methods().values())
    if word in entries.UNSUPPORTED:
        what = f"`{word}` is a mergekit key that mergetool does not support yet"
        draft.report(path, what, _INSTEAD.get(word, "remove it"), key=True)
    elif parameter and "parameters" in names:
        draft.report(path, f"`{word}` is a parameter", "put it under `parameters`", key=True)
    else:
        return draft.unknown_key(path, f"unknown key `{shorten(word)}`", names)
    return draft.drop(path)


def _entry(draft: Draft, path: Path) -> type[references.Strict]:
    """The model of the mapping at a path."""
    keys = [step for step in path if isinstance(step, str)]
    if not keys:
        return entries.Document
    if keys[:2] == ["calibration", "data"]:
        return stages.DataEntry
    if keys == ["rules", "models"]:
        return entries.RuleSourceEntry
    if keys[-1] == "model":
        return references.PathEntry if isinstance(path[-2], str) else references.ReferenceEntry
    return entries.ConditionEntry if "parameters" in keys else _ENTRIES.get(keys[-1], entries.ConditionEntry)


def _values(draft: Draft, found: list[tuple[Path, Any]]) -> bool:
    """Report wrong and missing values and remove them; whether a recipe is left."""
    remove: set[Path] = set()
    for path, item in found:
        missing = item["type"] == "missing"
        if not _follows(draft, path):
            what, fix = _missing(path) if missing else _sentence(path, item)
            draft.report(path[:-1] if missing else path, what, fix)
        remove.add(path[:-1] if missing else path)
    # The last entries of a list first, so that the paths of the others stay true.
    for path in sorted(remove, key=lambda p: [(str(type(s)), s) for s in p], reverse=True):
        if not path:
            return False
        draft.drop(path)
    return True


def _follows(draft: Draft, path: Path) -> bool:
    """Whether an error only follows from something that was reported and removed."""
    if path == ("models",) and {("slices",), ("modules",)} & set(draft.dropped):
        return True
    return any(dropped[: len(path)] == path for dropped in draft.dropped)


def _missing(path: Path) -> tuple[str, str]:
    place = "" if len(path) == 1 else f" in {title(path[:-1])}"
    return f"`{path[-1]}` is missing{place}", f"add `{path[-1]}: …`"


def _sentence(path: Path, item: Any) -> tuple[str, str]:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "ours":
        return f"{title(path)} {context['what']}", context["fix"]
    if kind in _MUST_BE:
        return f"{title(path)} must be {_MUST_BE[kind]}", ""
    return f"{title(path)} {_SENTENCES.get(kind, 'has a value that means nothing here')}", ""
