"""A recipe's text to its meaning; everything wrong with it is found at once."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import yaml

from mergetool.errors import Problem, RecipeError
from mergetool.recipe.calibrated import examine_data, examine_stages
from mergetool.recipe.combination import examine_combination, reported
from mergetool.recipe.data import Align, Calibration, Correct, Data, Evaluate, Report, Train
from mergetool.recipe.draft import Draft
from mergetool.recipe.entries import Document, RuleEntry
from mergetool.recipe.names import examine_methods, examine_parameters, examine_roles, examine_sources
from mergetool.recipe.overrides import override
from mergetool.recipe.recipe import Recipe, Source
from mergetool.recipe.references import label
from mergetool.recipe.rules import Rule, Where
from mergetool.recipe.settings import Setting, setting
from mergetool.recipe.shape import examine
from mergetool.recipe.spelling import did_you_mean
from mergetool.recipe.text import parse
from mergetool.recipe.tree import shorten

LARGEST = 10_000_000
"""Bytes; a larger file is no recipe."""


def load(recipe: str | bytes | os.PathLike[str], overrides: str | Iterable[str] = ()) -> Recipe:
    """Read a recipe strictly.

    >>> recipe = load("examples/ties.yaml", ["parameters.lambda=0.5"])
    >>> recipe.merge_method, recipe.where("base_model")
    ('ties', 'examples/ties.yaml:3:13')

    Args:
        recipe: a file's path, or the text of a recipe.
        overrides: changes such as ``models.0.parameters.weight=0.3``; one, or several.

    Raises:
        RecipeError: with everything that is wrong, each problem with its file, line and column.
    """
    found, problems = read(recipe, overrides)
    if problems or found is None:
        raise RecipeError(problems)
    return found


def read(
    recipe: str | bytes | os.PathLike[str], overrides: str | Iterable[str] = ()
) -> tuple[Recipe | None, list[Problem]]:
    """Read a recipe as far as it can be understood, for looking further than its first problems.

    Args:
        recipe: a file's path, or the text of a recipe.
        overrides: changes such as ``models.0.parameters.weight=0.3``; one, or several.

    Returns:
        The recipe, mended where that was possible, or None; and everything that is wrong with it.
    """
    path = None if _is_text(recipe) else pathlib.Path(os.fsdecode(recipe))
    name = "<text>" if path is None else shorten(str(path), 500)
    try:
        text = _decode(recipe if isinstance(recipe, str | bytes) and path is None else _bytes(path, name), name)
    except RecipeError as error:
        return None, list(error.problems)
    root, problems = parse(text, name)
    if root is None or root.value is None:
        empty = Problem("the recipe is empty", f"{name}:1:1", "begin with `merge_method: …`")
        return None, problems or [empty]
    draft = Draft(root, problems)
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    for change in overrides:
        override(draft, change)
    if overrides:
        text = yaml.safe_dump(root.plain(), sort_keys=False, allow_unicode=True)
    return _understand(draft, text, path), draft.problems


def _understand(draft: Draft, text: str, path: pathlib.Path | None) -> Recipe | None:
    document = examine(draft)
    known = examine_methods(draft)
    if document is None:
        return None
    examine_roles(draft, document)
    examine_sources(draft, document)
    examine_data(draft)
    for unclear in sorted(set(draft.unclear), reverse=True):
        draft.drop(unclear)
    if not known or draft.full:
        return None
    examine_parameters(draft, Document.model_validate(draft.root.plain()))
    document = Document.model_validate(draft.root.plain())
    recipe = _recipe(document, draft, text, path)
    examine_combination(draft, recipe)
    examine_stages(draft, recipe)
    return replace(recipe, reported=reported(draft, recipe))


def _recipe(document: Document, draft: Draft, text: str, path: pathlib.Path | None) -> Recipe:
    plain = draft.root.plain()
    reference = document.base_model
    tokenizer = document.tokenizer_source
    return Recipe(
        merge_method=document.merge_method,
        base_model=None if reference is None else label(reference),
        models=tuple(
            Source(label(entry.model), _settings(raw), entry.data)
            for entry, raw in zip(document.models, plain["models"], strict=True)
        ),
        parameters=_settings(plain),
        rules=tuple(
            _rule(i, entry, raw)
            for i, (entry, raw) in enumerate(zip(document.rules or (), plain.get("rules") or (), strict=True))
        ),
        dtype=document.dtype,
        out_dtype=document.out_dtype,
        seed=document.seed,
        output=document.output,
        tokenizer_source=None if tokenizer is None else label(tokenizer),
        text=text,
        folder=None if path is None else path.parent,
        tree=draft.root,
        **_stages(document),
    )


def _stages(document: Document) -> dict[str, Any]:
    """The keys about data and about the stages around the merge, as arguments of a recipe."""
    calibration, align, correct, train = document.calibration, document.align, document.correct, document.train
    found: dict[str, Any] = {}
    if calibration is not None:
        entries = {name: {"path": e} if isinstance(e, str) else e.model_dump() for name, e in calibration.data.items()}
        data = tuple(Data(name, **entries[name]) for name in sorted(entries))
        found["calibration"] = Calibration(data, calibration.adapter)
    if align is not None and align.method != "none":
        reference = None if align.reference is None else label(align.reference)
        groups: Any = tuple(align.groups)
        names = tuple(dict.fromkeys(align.data or ()))
        seed = document.seed if align.seed is None else align.seed
        said = align.model_dump(exclude={"reference", "groups", "data", "seed"})
        found["align"] = Align(reference=reference, groups=groups, data=names, seed=seed, **said)
    if correct is not None and correct.method != "none":
        scope: Any = correct.scope or ("all" if correct.method == "repair" else "output")
        names = tuple(dict.fromkeys(correct.data or ()))
        found["correct"] = Correct(data=names, scope=scope, **correct.model_dump(exclude={"data", "scope"}))
    if train is not None:
        seed = document.seed if train.seed is None else train.seed
        found["train"] = Train(seed=seed, **train.model_dump(exclude={"seed"}))
    if (evaluate := document.evaluate) is not None:
        names = tuple(dict.fromkeys(evaluate.data or ()))
        found["evaluate"] = Evaluate(data=names, **evaluate.model_dump(exclude={"data"}))
    if isinstance(document.report, str):
        found["report"] = Report(draw=False)
    elif document.report is not None:
        names = tuple(dict.fromkeys(document.report.data or ()))
        found["report"] = Report(data=names, **document.report.model_dump(exclude={"data"}))
    return found


def _settings(raw: dict[str, Any]) -> dict[str, Setting]:
    return {name: setting(value) for name, value in (raw.get("parameters") or {}).items()}


def _rule(index: int, entry: RuleEntry, raw: dict[str, Any]) -> Rule:
    where = entry.where
    return Rule(
        index=index,
        where=Where(
            part=None if where.part is None else tuple(where.part),
            layers=None if where.layers is None else tuple(where.layers),
            name=None if where.name is None else tuple(where.name),
        ),
        merge_method=entry.merge_method,
        parameters=_settings(raw),
        models={
            label(source.model): _settings(below)
            for source, below in zip(entry.models or (), raw.get("models") or (), strict=True)
        },
        keep=None if entry.keep is None else label(entry.keep),
        drop=entry.drop is True,
    )


def _is_text(recipe: str | bytes | os.PathLike[str]) -> bool:
    """Whether it is a recipe itself and not the path of one."""
    if isinstance(recipe, bytes):
        return True
    if not isinstance(recipe, str):
        return False
    return not recipe.strip() or "\n" in recipe or ": " in recipe or recipe.lstrip().startswith("{")


def _bytes(path: pathlib.Path | None, name: str) -> bytes:
    assert path is not None
    try:
        with path.open("rb") as file:
            return file.read(LARGEST + 1)
    except IsADirectoryError:
        raise RecipeError("a folder is not a recipe", name, "name the YAML file in it") from None
    except FileNotFoundError:
        raise RecipeError("there is no such file", name, _neighbour(path)) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"the recipe cannot be read: {why}", name) from None


def _neighbour(path: pathlib.Path) -> str:
    try:
        files = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml", ".json"))
    except OSError:
        return f"there is no folder {path.parent} either"
    return did_you_mean(path.name, files[:50])


def _decode(recipe: str | bytes, name: str) -> str:
    if len(recipe) > LARGEST:
        raise RecipeError(f"a recipe of more than {LARGEST // 10**6} MB is not read", name)
    if isinstance(recipe, str):
        return recipe.removeprefix("\ufeff")
    try:
        return recipe.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = recipe[: error.start].split(b"\n")
        column = len(before[-1].decode("utf-8", "replace")) + 1
        where = f"{name}:{len(before)}:{column}"
        raise RecipeError("the recipe is not UTF-8 text", where, "save it as UTF-8") from None
