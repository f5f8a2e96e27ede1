"""Everything that is derived from the code: reference pages, JSON schema, the tables and the tree of the README.

``python -m mergetool.reference`` writes them all; with ``--check`` it only says which are out of date.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

import mergetool
from mergetool.anatomy import ROLES
from mergetool.cli.markdown import anchor, fenced, join, markdown, table
from mergetool.cli.methods import sources, word
from mergetool.cli.pages import cli_page
from mergetool.methods import METHODS, Method
from mergetool.recipe import entries, schema

COMMAND = "python -m mergetool.reference"
ROOT = Path(__file__).parent.parent
NOTICE = f"<!-- Made by `{COMMAND}` from the code; changes belong there. -->"
HEADS = {
    "Document": "The recipe",
    "SourceEntry": "An entry of `models`",
    "RuleEntry": "An entry of `rules`",
    "WhereEntry": "`where` of a rule",
    "RuleSourceEntry": "An entry of `models` in a rule",
    "ConditionEntry": "A setting with a filter",
    "ReferenceEntry": "A model as a mapping",
    "PathEntry": "A path as a mapping",
    "CalibrationEntry": "`calibration`",
    "DataEntry": "A data set as a mapping",
    "AlignEntry": "`align`",
    "CorrectEntry": "`correct`",
    "TrainEntry": "`train`",
    "EvaluateEntry": "`evaluate`",
    "ReportEntry": "`report`",
}
"""The heading of each mapping that a recipe may hold, in the order of the page."""
_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true/false"}


def methods_page() -> str:
    """Every method: what it does, its parameters, its paper, and where it differs."""
    parts = [NOTICE, "# Methods", *(_method(method) for method in METHODS.values())]
    return join(parts)


def methods_table() -> str:
    """One line for each method."""
    rows = [(f"`{m.name}`", m.title, m.summary, _paper(m)) for m in METHODS.values()]
    return table(("`merge_method`", "method", "what it does", "paper"), rows)


def _method(method: Method) -> str:
    rows = [
        (
            f"`{p.name}`",
            p.kind,
            "each source" if p.per_source else "all",
            "required" if p.required else f"`{word(p.default)}`",
            p.description,
        )
        for p in method.parameters.values()
    ]
    cited = f"**Paper.** {method.citation} ({_paper(method)})" if method.citation else ""
    differs = f"**Differences.** {method.differs}" if method.differs else ""
    parameters = table(("parameter", "value", "one for", "default", "meaning"), rows) if rows else ""
    return join(
        (
            f"## {method.title}: `{method.name}`",
            markdown(method.text),
            f"**Models.** {sources(method)}",
            parameters,
            differs,
            cited,
        )
    )


def _paper(method: Method) -> str:
    arxiv = re.fullmatch(r"arXiv:(\S+)", method.paper)
    return f"[{method.paper}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else method.paper and f"<{method.paper}>"


def recipe_page() -> str:
    """Every key of a recipe, and every role that a rule may name."""
    whole = entries.Document.model_json_schema()
    found = {"Document": whole, **whole["$defs"]}
    parts = [NOTICE, "# Recipe keys"]
    for name in sorted(found, key=list(HEADS).index):
        parts += [f"## {HEADS[name]}", found[name]["description"], _keys(found[name], found)]
    roles = table(("role", "meaning"), [(f"`{role}`", meaning) for role, meaning in ROLES.items()])
    about = "What `part` in a rule may name. The word before a dot names the whole group: `attention`, `mlp`."
    return join((*parts, "## Roles", about, roles))


def _keys(entry: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for key, value in entry["properties"].items():
        default = value.get("default")
        default = ", ".join(default) if isinstance(default, list) else default
        said = "required" if key in entry.get("required", ()) else "" if default is None else f"`{word(default)}`"
        named = found.get(str(value.get("$ref", "")).rpartition("/")[2], {})
        rows.append((f"`{key}`", _kind(value), said, value.get("description") or named.get("description", "")))
    return table(("key", "value", "default", "meaning"), rows)


def _kind(value: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "$ref" in value:
        head = HEADS[value["$ref"].rpartition("/")[2]]
        return f"[{head[0].lower()}{head[1:]}](#{anchor(head)})"
    union = value.get("anyOf") or value.get("oneOf")
    if union:
        return _either(list(dict.fromkeys(_kind(branch) for branch in union if branch.get("type") != "null")))
    if "DataEntry" in str(value.get("additionalProperties")):
        return f"by name: {_kind(value['additionalProperties'])}"
    if "additionalProperties" in value:
        return "[settings](../guide/settings.md) by name"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{word(choice)}`" for choice in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        return f"list of {_kind(value['items'])}"
    types = value["type"] if isinstance(value["type"], list) else [value["type"]]
    return ", ".join(_WORDS[name] for name in types)


def _either(kinds: list[str]) -> str:
    """One of several kinds; a list of the first is not spelled out again."""
    return " or ".join("a list of these" if kind == f"list of {kinds[0]}" else kind for kind in kinds)


def schema_file() -> str:
    """The JSON schema of recipes."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def python_page() -> str:
    """The public names of the package, with signature and docstring."""
    summary, _, picture = (mergetool.__doc__ or "").partition("\n\n")
    parts = [NOTICE, "# Python", summary, fenced(picture.strip("\n"))]
    for name in mergetool.__all__:
        value = getattr(mergetool, name)
        parts.append(f"## `{name}`")
        if isinstance(value, Mapping):
            parts.append("A mapping with the keys " + ", ".join(f"`{key}`" for key in value) + ".")
        else:
            parts += [_attributes(value) if isinstance(value, type) else fenced(_signature(name, value), "python")]
            parts.append(markdown(inspect.getdoc(value) or ""))
    return join(parts)


def _attributes(kind: type) -> str:
    """The public fields of a dataclass, one a line."""
    fields = getattr(kind, "__dataclass_fields__", {}).values()
    return fenced("\n".join(f"{field.name}: {field.type}" for field in fields), "python") if fields else ""


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    shown, star = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            shown.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        shown.append(str(parameter).replace("'", ""))
    line = f"{name}({', '.join(shown)}) -> {signature.return_annotation}"
    if len(line) <= 100:
        return line
    return "\n".join((f"{name}(", *(f"    {item}," for item in shown), f") -> {signature.return_annotation}"))


def tree() -> str:
    """The package as a tree: each package and module with the first sentence of its docstring."""
    lines = []
    for path in sorted((ROOT / "mergetool").rglob("*.py"), key=_order):
        package = path.name == "__init__.py"
        place = (path.parent if package else path).relative_to(ROOT)
        indent = "  " * (len(place.parts) - 1)
        lines.append(f"{indent}{place.name}{'/' if package else ''}".ljust(26) + _first_sentence(path))
    return fenced("\n".join(lines))


def _order(path: Path) -> tuple[str, ...]:
    """A package before its modules, its modules before the packages in it."""
    parts = path.relative_to(ROOT).parts
    return (*(f"1{part}" for part in parts[:-1]), "" if parts[-1] == "__init__.py" else f"0{parts[-1]}")


def _first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"\.(?= |$)", text)[0].replace("``", "")


def readme(old: str) -> str:
    """The README with its derived parts renewed."""
    for name, make in (("methods", methods_table), ("tree", tree)):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = old.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise click.ClickException(f"README.md has no {begin} … {end}")
        old = f"{before}{begin}\n{make()}\n{end}{after}"
    return old


def derived() -> dict[Path, str]:
    """Every derived file with the text it should have."""
    folder = ROOT / "docs" / "reference"
    made = {
        folder / "methods.md": methods_page(),
        folder / "recipe.md": recipe_page(),
        folder / "cli.md": join((NOTICE, cli_page())),
        folder / "recipe.schema.json": schema_file(),
        folder / "python.md": python_page(),
    }
    front = ROOT / "README.md"
    return made | ({front: readme(front.read_text("utf-8"))} if front.exists() else {})


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if anything is out of date.")
def main(check: bool) -> None:
    """Write everything that is derived from the code."""
    stale = [path for path, text in derived().items() if not path.exists() or path.read_text("utf-8") != text]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if check and stale:
        raise click.ClickException(f"out of date: {names}; run `{COMMAND}`")
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(derived()[path], "utf-8")
    click.echo(f"written: {names}" if stale else "up to date")


if __name__ == "__main__":
    main()
