"""What does not go together in a recipe whose every key and value is right by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergetool.recipe.draft import Draft
from mergetool.recipe.recipe import Recipe
from mergetool.recipe.rules import Rule
from mergetool.recipe.settings import constant
from mergetool.recipe.tree import Path

if TYPE_CHECKING:
    from mergetool.methods import Method, Parameter


def examine_combination(draft: Draft, recipe: Recipe) -> None:
    """Report a missing base, a wrong number of models, missing parameters, and constants that clash."""
    seen: set[str] = set()
    for rule in (None, *recipe.rules):
        if rule is not None and (rule.keep is not None or rule.drop):
            continue
        method = recipe.method(rule)
        place: Path = (*rule.path, "merge_method") if rule else ("merge_method",)
        if method.name not in seen:
            _models(draft, recipe, method, place)
        if rule is None or method.name != recipe.merge_method:
            for parameter in method.parameters.values():
                if parameter.required and not _excused(draft, parameter.name, method):
                    _missing(draft, recipe, rule, place, parameter)
        _clashes(draft, recipe, rule, method, recipe.merged_by(method))
        seen.add(method.name)


def _models(draft: Draft, recipe: Recipe, method: Method, place: Path) -> None:
    if method.base == "required" and recipe.base_model is None and ("base_model",) not in draft.dropped:
        draft.report(place, f"`{method.name}` needs a base", "add `base_model: …`")
    _count(draft, method, len(recipe.merged_by(method)))


def _count(draft: Draft, method: Method, count: int) -> None:
    if any(path[0] == "models" and len(path) == 2 for path in draft.dropped):
        return
    if count >= method.fewest and (method.most is None or count <= method.most):
        return
    few = count < method.fewest
    bound = method.fewest if few else method.most
    limit = "exactly" if method.fewest == method.most else "at least" if few else "at most"
    besides = "" if method.base == "ignored" else " besides the base"
    what = f"`{method.name}` merges {limit} {bound} model{'s' * (bound != 1)}{besides}, and here are {count}"
    draft.report(("models",), what, "add models" if few else "remove models, or choose another method")


def reported(draft: Draft, recipe: Recipe) -> frozenset[str]:
    """The parameters that were reported, or that are missing only because of something that was."""
    used = [recipe.method(), *(recipe.method(rule) for rule in recipe.rules)]
    excused = {name for method in used for name in method.parameters if _excused(draft, name, method)}
    return frozenset(excused | draft.faulty)


def _excused(draft: Draft, parameter: str, method: Method) -> bool:
    """Whether the parameter may be missing only because of something that was reported and removed."""
    for path in draft.dropped:
        below = path[path.index("parameters") + 1 :] if "parameters" in path else path[-1:]
        # A whole mapping, the parameter itself, or a name that may have been meant for it.
        if not below or below[0] == parameter or ("parameters" in path and below[0] not in method.parameters):
            return True
    return False


def _missing(draft: Draft, recipe: Recipe, rule: Rule | None, place: Path, parameter: Parameter) -> None:
    name, method = parameter.name, recipe.method(rule)
    sources = recipe.merged_by(method) if parameter.per_source else (None,)
    bare = [s for s in sources if not any(name in settings for _, settings in recipe.levels(s, rule))]
    if bare:
        draft.faulty.add(name)
    if bare and len(bare) == len(sources):
        whose = "for each of the `models`, or for all " if parameter.per_source else ""
        draft.report(place, f"`{method.name}` needs `{name}`", f"set it {whose}under `parameters`")
        return
    for source in bare:
        what = f"`{method.name}` needs `{name}`, which is not set for this model"
        draft.report(("models", recipe.positions[str(source)]), what, f"add `{name}: …` under its `parameters`")


def _clashes(draft: Draft, recipe: Recipe, rule: Rule | None, method: Method, sources: tuple[str, ...]) -> None:
    """Ask the method whether its parameters go together, if they are the same for every tensor."""
    used = [
        (path, name, settings[name])
        for source in (*sources, None)
        for path, settings in recipe.levels(source, rule)
        for name in settings
        if name in method.parameters
    ]
    if not all(constant(setting) for _, _, setting in used):
        return
    resolved = recipe.parameters_for(method, "", 0.0, sources, rule)
    if resolved.problems or not sources:
        return
    for argument, what in method.check(resolved.arguments):
        name = argument.rstrip("_")
        draft.faulty.add(name)
        at = next(((*path, name) for path, parameter, _ in used if parameter == name), ("merge_method",))
        draft.report(at, what)
