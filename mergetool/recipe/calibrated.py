"""What a recipe says about data, examined: the names it uses, the files it names, and who needs data."""

from __future__ import annotations

import re
from collections.abc import Collection

from mergetool.recipe.data import FORMATS, HUB, Data
from mergetool.recipe.draft import Draft
from mergetool.recipe.recipe import Recipe
from mergetool.recipe.spelling import did_you_mean, nearest
from mergetool.recipe.tree import Node, Path, shorten

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)(@(?P<revision>[^:\s]+))?"
_SPLIT = r"(:(?P<config>[^:\[\]\s]+))?:(?P<split>[\w.+-]+(\[.*\])?)"
_NAMING = ("align", "correct", "evaluate", "report")
"""The stages that may name some of the data."""
_ON_HUB = re.compile(re.escape(HUB) + _REPO + _SPLIT)


def on_hub(path: str) -> dict[str, str | None] | None:
    """The ``repo``, ``revision``, ``config`` and ``split`` of ``hub:repo[@revision][:config]:split``, if it is one."""
    found = _ON_HUB.fullmatch(path)
    return None if found is None else found.groupdict()


def examine_data(draft: Draft) -> None:
    """Report names that no data can have or has; read a name as the nearest, if any is near."""
    data = _child(draft, ("calibration", "data"))
    names = dict.fromkeys(data.value) if data is not None and isinstance(data.value, dict) else {}
    for name in names:
        _data(draft, ("calibration", "data", name))
    used = _used(draft)
    if not names:
        if used and not _reported(draft):
            path, name = used[0]
            what = f"`{shorten(name)}` is to be the name of calibration data, and the recipe has no `calibration`"
            draft.report(path, what, f"add `calibration: {{data: {{{shorten(name)}: FILE}}}}`")
        return
    dropped = {str(path[2]) for path in draft.dropped if path[:2] == ("calibration", "data") and len(path) == 3}
    named = {name for _, name in used}
    for path, name in reversed(used):  # what is dropped from a list leaves the paths before it true
        if name not in names and name not in dropped:
            _strange(draft, path, name, names, named)
    for key in _NAMING:
        if draft.root.nearest((key, "data")).value == []:
            draft.drop((key, "data"))


def _strange(draft: Draft, path: Path, name: str, names: Collection[str], named: set[str]) -> None:
    """Report a name that no data have, and data of a like name that nothing refers to: either may be misspelt."""
    near = None if draft.full else nearest(name, names)
    draft.report(
        path, f"there are no calibration data `{shorten(name)}`", "" if draft.full else did_you_mean(name, names)
    )
    if near is None:
        return draft.drop(path)
    draft.root.nearest(path).value = near
    if near not in named:
        what = f"nothing refers to the data `{near}`, but something to `{shorten(name)}`"
        draft.report(("calibration", "data", near), what, f"did you mean `{shorten(name)}`?", key=True)
        named.add(near)
    return None


def _child(draft: Draft, path: Path) -> Node | None:
    node: Node | None = draft.root
    for step in path:
        node = node.child(step) if node is not None else None
    return node


def _reported(draft: Draft) -> bool:
    """Whether the recipe's data were removed because something else was wrong with them."""
    return any(path[:1] == ("calibration",) for path in draft.dropped)


def _data(draft: Draft, path: Path) -> None:
    """Report a name or a place that data cannot have."""
    name = str(path[-1])
    if not _NAME.fullmatch(name):
        what = f"`{shorten(name)}` is no name for data"
        draft.report(path, what, "use letters, digits, `_`, `-` and `.`: files are called by it", key=True)
    node = draft.root.nearest(path)
    if isinstance(node.value, dict):
        path = (*path, "path")
        node = node.value["path"]
    written = str(node.value)
    if written.startswith(HUB):
        if on_hub(written) is None:
            fix = "write `hub:org/name:split`; a revision and a configuration may stand between: `@revision:config:`"
            draft.report(path, f"`{shorten(written)}` names no data set on the Hub", fix)
        return
    adapter = _child(draft, ("calibration", "adapter"))
    if (adapter is None or adapter.value is None) and Data(name, written).format is None:
        what = f"there is no reader for `{shorten(written)}`, by how its name ends"
        fix = f"use one of {', '.join(FORMATS)}, or read it with an `adapter` of your own"
        draft.report(path, what, fix)


def _used(draft: Draft) -> list[tuple[Path, str]]:
    """Every place that names data, with the name."""
    models = _child(draft, ("models",))
    many = len(models.value) if models is not None and isinstance(models.value, list) else 0
    paths: list[Path] = [("models", i, "data") for i in range(many)] + [(key, "data") for key in _NAMING]
    used: list[tuple[Path, str]] = []
    for path in paths:
        node = _child(draft, path)
        if node is None or node.value is None:
            continue
        if isinstance(node.value, list):
            used += [((*path, i), str(item.value)) for i, item in enumerate(node.value)]
        else:
            used.append((path, str(node.value)))
    return used


def examine_stages(draft: Draft, recipe: Recipe) -> None:
    """Report stages that lack what they need: data, a second model, a model for each task."""
    _needs_data(draft, recipe)
    align, correct = recipe.align, recipe.correct
    whole = not any(path[0] == "models" for path in draft.dropped)
    if align is not None and whole and len({*recipe.sources, recipe.reference}) < 2:
        draft.report(("align",), "`align` turns models to face each other, and here is one", "remove it", key=True)
    if align is not None and align.method == "weight_matching" and _child(draft, ("align", "score")) is not None:
        what = "`score` is about activations, and `weight_matching` compares weights"
        draft.report(("align", "score"), what, "remove it, or use `method: activation_matching`", key=True)
    if recipe.report is not None and recipe.report.cka and whole and len({*recipe.sources, recipe.reference}) < 2:
        draft.report(("report", "cka"), "`cka` compares models, and here is one", "remove it", key=True)
    if correct is None:
        return
    if correct.method == "repair" and _child(draft, ("correct", "fold")) is not None:
        what = "`fold` is about the tasks of `tact`; `repair` makes one correction, in the model"
        draft.report(("correct", "fold"), what, "remove it", key=True)
    elif correct.method == "tact" and correct.fold == "head" and correct.scope != "output":
        what = "`fold: head` has room for a correction of the output only"
        draft.report(("correct", "fold"), what, "use `scope: output`, or another `fold`")
    if correct.method == "tact" and recipe.calibration is not None:
        _tasks(draft, recipe)


def _needs_data(draft: Draft, recipe: Recipe) -> None:
    if recipe.calibration is not None or _reported(draft) or _used(draft):
        return
    needs: list[tuple[str, str]] = []
    if recipe.align is not None and recipe.align.method == "activation_matching":
        needs.append(("align", "activation_matching"))
    if recipe.correct is not None:
        needs.append(("correct", recipe.correct.method))
    if recipe.report is not None and recipe.report.cka:
        what = "`cka` runs the models on data, and the recipe has no `calibration`"
        draft.report(("report", "cka"), what, "add `calibration: {data: {NAME: FILE}}`", key=True)
    for key, method in needs:
        what = f"`{method}` runs the models on data, and the recipe has no `calibration`"
        draft.report((key, "method"), what, "add `calibration: {data: {NAME: FILE}}`")


def _tasks(draft: Draft, recipe: Recipe) -> None:
    """Report data that `tact` cannot correct towards a model, because none or several have them as their own."""
    assert recipe.correct is not None
    assert recipe.calibration is not None
    if any(path[0] in ("models", "correct") for path in draft.dropped):
        return
    owners: dict[str, list[str]] = {}
    for source in recipe.models:
        if source.data is not None:
            owners.setdefault(source.data, []).append(source.reference)
    for name, models in owners.items():
        if len(models) > 1:
            what = (
                f"`tact` corrects towards one model for each task, and `{shorten(name)}` is the `data` of {len(models)}"
            )
            draft.report(("models", recipe.positions[models[1]], "data"), what, "give each model data of its own")
    if not owners:
        what = "`tact` corrects each task towards its own model, and no model has `data` of its own"
        draft.report(("correct", "method"), what, "add `data: NAME` to the models, or use `method: repair`")
        return
    for i, name in enumerate(recipe.correct.data):
        if name not in owners:
            what = f"`tact` corrects each task towards its own model, and no model has `data: {shorten(name)}`"
            draft.report(("correct", "data", i), what, f"add `data: {shorten(name)}` to a model, or remove it here")
