"""The JSON schema of recipes, so that editors complete and check them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from mergetool.recipe.catalogue import methods, roles
from mergetool.recipe.entries import Document
from mergetool.recipe.names import WITHOUT_EFFECT

if TYPE_CHECKING:
    from mergetool.methods import Method, Parameter

_TYPES = {float: "number", int: "integer", bool: "boolean", str: "string"}


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with every method and every parameter in it."""
    found = Document.model_json_schema()
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    entries = found["$defs"]
    names = {"enum": list(methods()), "description": found["properties"]["merge_method"]["description"]}
    found["properties"]["merge_method"] = names
    entries["RuleEntry"]["properties"]["merge_method"] = names
    part = entries["WhereEntry"]["properties"]["part"]
    role = {"enum": list(roles())}
    part["anyOf"] = [role, {"type": "array", "items": role}]
    of_sources = (entries["SourceEntry"], entries["RuleSourceEntry"])
    for entry, shared in ((found, True), (entries["RuleEntry"], True), *((entry, False) for entry in of_sources)):
        entry["properties"]["parameters"] = _parameters(entry["properties"]["parameters"], shared)
    return found


def _parameters(old: dict[str, Any], shared: bool) -> dict[str, Any]:
    """The schema of a mapping of parameters: each parameter of any method by name, and no other."""
    setting = next(branch for branch in old["anyOf"] if "additionalProperties" in branch)["additionalProperties"]
    owners: dict[str, list[Method]] = {}
    for method in methods().values():
        for parameter in method.parameters.values():
            if shared or parameter.per_source:
                owners.setdefault(parameter.name, []).append(method)
    properties: dict[str, Any] = {name: _setting(setting, name, owners[name]) for name in owners}
    if shared:
        properties |= {name: {"type": "boolean", "deprecated": True} for name in WITHOUT_EFFECT}
    mapping = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"anyOf": [mapping, {"type": "null"}], "description": old["description"]}


def _setting(setting: dict[str, Any], name: str, owners: list[Method]) -> dict[str, Any]:
    """The schema of a setting whose plain values are those that some method takes."""
    declared = [method.parameters[name] for method in owners]
    plain: list[dict[str, Any]] = []
    for parameter in declared:
        if (kind := _scalar(parameter)) not in plain:
            plain.append(kind)
    found = copy.deepcopy(setting)
    branches = [branch for branch in found["oneOf"] if not isinstance(branch.get("type"), list)]
    found["oneOf"] = [{"anyOf": plain}, *branches]
    found["description"] = " ".join(dict.fromkeys(parameter.description for parameter in declared))
    found["description"] += f" ({', '.join(method.name for method in owners)})"
    defaults = {repr(parameter.default): parameter.default for parameter in declared}
    if len(defaults) == 1 and not declared[0].required:
        found["default"] = declared[0].default
    return found


def _scalar(parameter: Parameter) -> dict[str, Any]:
    if parameter.choices:
        return {"enum": list(parameter.choices)}
    bounds = {"minimum": parameter.low, "maximum": parameter.high}
    return {"type": _TYPES[parameter.type], **{k: v for k, v in bounds.items() if v is not None}}
