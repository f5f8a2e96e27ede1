"""What a recipe names, examined: methods, roles, sources, and the parameters of its methods."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from mergetool.recipe.catalogue import methods, roles
from mergetool.recipe.draft import Draft, title
from mergetool.recipe.entries import Document
from mergetool.recipe.references import label
from mergetool.recipe.settings import scalars
from mergetool.recipe.spelling import did_you_mean, nearest
from mergetool.recipe.tree import Node, Path, shorten

if TYPE_CHECKING:
    from mergetool.methods import Method, Parameter

WITHOUT_EFFECT = ("int8_mask",)
"""Parameters of mergekit's that change its memory and not its result; accepted and ignored."""


def examine_methods(draft: Draft) -> bool:
    """Report unknown methods and read them as the nearest; whether the recipe's own is known or could be read."""
    rules = draft.root.nearest(("rules",)).value
    count = len(rules) if isinstance(rules, list) else 0
    paths: list[Path] = [("merge_method",), *(("rules", i, "merge_method") for i in range(count))]
    for path in paths:
        if isinstance(_leaf(draft, path), str):  # what is no text was reported as such
            _mend(draft, path, methods(), "method")
    return _leaf(draft, ("merge_method",)) in methods()


def _leaf(draft: Draft, path: Path) -> object:
    """The scalar at a path; None where there is nothing, or no scalar."""
    node = draft.root.nearest(path[:-1]).child(path[-1])
    return node.value if node is not None and isinstance(node.value, str) else None


def examine_roles(draft: Draft, document: Document) -> None:
    """Report roles that no part has."""
    for i, rule in enumerate(document.rules or ()):
        path = ("rules", i, "where", "part")
        node = draft.root.nearest(path)
        if rule.where.part is not None and isinstance(node.value, list):
            for k in range(len(node.value)):
                _mend(draft, (*path, k), roles(), "part")
        elif rule.where.part is not None:
            _mend(draft, path, roles(), "part")


def _mend(draft: Draft, path: Path, names: Iterable[str], kind: str) -> None:
    """Report a value that is none of the names; read it as the nearest, if any is near."""
    node, names = draft.root.nearest(path), list(names)
    word = str(node.value)
    if word in names:
        return
    near = None if draft.full else nearest(word, names)
    draft.report(path, f"unknown {kind} `{shorten(word)}`", "" if draft.full else did_you_mean(word, names))
    if near is not None:
        node.value = near
    elif path[0] == "rules":
        draft.unclear.append(path[:2])


def examine_sources(draft: Draft, document: Document) -> None:
    """Report models named twice, and references to models that the recipe does not have."""
    labels = [label(entry.model) for entry in document.models]
    firsts = {name: i for i, name in reversed(list(enumerate(labels)))}
    twice = [i for i, name in enumerate(labels) if firsts[name] != i]
    for i in twice:
        first = draft.root.nearest(("models", firsts[labels[i]], "model")).place
        what = f"`{shorten(labels[i])}` is among the models twice"
        draft.report(("models", i, "model"), what, f"keep one; the first is at {first}")
    base = [] if document.base_model is None else [label(document.base_model)]
    known = dict.fromkeys([*labels, *base])
    _tokenizer(draft, document, known)
    _reference(draft, document, known)
    for i, rule in enumerate(document.rules or ()):
        if rule.keep is not None and label(rule.keep) not in known:
            _stranger(draft, ("rules", i, "keep"), label(rule.keep), known)
            draft.unclear.append(("rules", i))
        _of_rule(draft, ("rules", i, "models"), [label(entry.model) for entry in rule.models or ()], firsts)
    for i in reversed(twice):
        draft.drop(("models", i))


def _of_rule(draft: Draft, path: Path, own: list[str], listed: Collection[str]) -> None:
    """Report what a rule says about models that are not among the recipe's, or says twice."""
    wrong = [i for i, name in enumerate(own) if name not in listed or own.index(name) < i]
    for i in wrong:
        if own[i] in listed:
            draft.report((*path, i, "model"), f"`{shorten(own[i])}` is among the models twice", "keep one")
        else:
            _stranger(draft, (*path, i, "model"), own[i], sorted(listed))
    for i in reversed(wrong):
        draft.drop((*path, i))


def _stranger(draft: Draft, path: Path, name: str, known: Iterable[str]) -> None:
    draft.report(path, f"`{shorten(name)}` is not a model of this recipe", did_you_mean(name, known))


def _tokenizer(draft: Draft, document: Document, known: Iterable[str]) -> None:
    if document.tokenizer_source is None:
        return
    name, path = label(document.tokenizer_source), ("tokenizer_source",)
    if name == "union":
        fix = "use `base` or one of the models; all models must then have its vocabulary"
        draft.report(path, "`tokenizer_source: union` is not supported yet", fix)
    elif name != "base" and name not in known:
        _stranger(draft, path, name, ["base", *known])
    else:
        return
    draft.drop(path)


def _reference(draft: Draft, document: Document, known: Iterable[str]) -> None:
    reference = None if document.align is None else document.align.reference
    if reference is not None and label(reference) not in known:
        _stranger(draft, ("align", "reference"), label(reference), known)
        draft.drop(("align", "reference"))


def examine_parameters(draft: Draft, document: Document) -> None:
    """Report parameters that the methods do not have or not there, and values they do not take."""
    own = methods()[document.merge_method]
    rules = document.rules or ()
    of_rules = [methods().get(rule.merge_method or "", own) for rule in rules]
    everyone = list({method.name: method for method in (own, *of_rules)}.values())
    _level(draft, ("parameters",), document.parameters, everyone)
    for i, entry in enumerate(document.models):
        path: Path = ("models", i, "parameters")
        _level(draft, path, entry.parameters, everyone)
    for i, (rule, method) in enumerate(zip(rules, of_rules, strict=True)):
        _level(draft, ("rules", i, "parameters"), rule.parameters, [method])
        for k, below in enumerate(rule.models or ()):
            path = ("rules", i, "models", k, "parameters")
            _level(draft, path, below.parameters, [method])


def _level(draft: Draft, path: Path, settings: dict[str, Any] | None, allowed: list[Method]) -> None:
    """Examine one mapping of parameters."""
    node = draft.root.nearest(path)
    if not settings or not isinstance(node.value, dict):
        return
    of_source = "models" in path
    for name in list(node.value):
        owners = [method.parameters[name] for method in allowed if name in method.parameters]
        if name in WITHOUT_EFFECT:
            continue
        if not owners:
            names = {own.name: None for method in allowed for own in method.parameters.values()}
            draft.unknown_key((*path, name), f"`{allowed[0].name}` has no parameter `{shorten(name)}`", names)
        elif of_source and not any(owner.per_source for owner in owners):
            what = f"`{name}` is one value per tensor and cannot differ between models"
            level = "rule's" if path[0] == "rules" else "recipe's"
            draft.report((*path, name), what, f"move it to the {level} `parameters`", key=True)
            draft.drop((*path, name))
    for name, below in list(node.value.items()):
        owners = [method.parameters[name] for method in allowed if name in method.parameters]
        all(_values(draft, (*path, name), below, owner) for owner in owners)  # the first that refuses it says it all


def _values(draft: Draft, path: Path, node: Node, parameter: Parameter) -> bool:
    """Report a value that the parameter does not take, and remove the setting; whether it takes all of them."""
    for below, value in scalars(node.plain()):
        try:
            parameter.check(value)
        except ValueError as error:
            place = (*path, *below)
            subject = title(place) if below and isinstance(below[-1], int) else f"`{path[-1]}`"
            draft.report(place, f"{subject} {error}", parameter.advice(value))
            draft.drop(path)
            return False
    return True
