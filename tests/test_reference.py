"""What is derived from the code is up to date, and nothing of the code goes without a word."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import mergetool
from mergetool import reference
from mergetool.cli.group import COMMANDS
from mergetool.cli.group import mergetool as commands
from mergetool.methods import METHODS
from mergetool.recipe import entries
from mergetool.recipe.references import Strict

ROOT = Path(mergetool.__file__).parent.parent
GUIDE = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_everything_derived_is_up_to_date():
    result = CliRunner().invoke(reference.main, ["--check"])
    assert result.exit_code == 0, result.output


def test_check_names_the_command_that_mends(tmp_path, monkeypatch):
    stale = tmp_path / "page.md"
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    monkeypatch.setattr(reference, "derived", lambda: {stale: "new\n"})
    result = CliRunner().invoke(reference.main, ["--check"])
    assert result.exit_code == 1
    assert "page.md" in result.output
    assert reference.COMMAND in result.output
    assert not stale.exists()
    assert CliRunner().invoke(reference.main).exit_code == 0
    assert stale.read_text() == "new\n"


def test_the_readme_keeps_what_is_not_derived():
    old = "a\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nb\n<!-- tree:begin --><!-- tree:end -->\nc\n"
    new = reference.readme(old)
    assert new.startswith("a\n<!-- methods:begin -->\n|")
    assert "\nb\n" in new
    assert new.endswith("\nc\n")
    assert reference.readme(new) == new
    with pytest.raises(Exception, match="tree:begin"):
        reference.readme(old.replace("tree:begin", "tree"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.summary.endswith(".")
    assert method.text.count("\n") > 2, "one line is the summary; say when to use it"
    assert bool(method.paper) == bool(method.citation)
    for parameter in method.parameters.values():
        assert re.match(r"[A-Z].*\.$", parameter.description), f"{name}: {parameter.name}"


@pytest.mark.parametrize("kind", [k for k in vars(entries).values() if isinstance(k, type) and issubclass(k, Strict)])
def test_every_recipe_key_has_a_meaning(kind):
    for name, field in kind.model_fields.items():
        assert field.description or getattr(field.annotation, "__doc__", ""), f"{kind.__name__}.{name}"


@pytest.mark.parametrize("path", sorted((ROOT / "mergetool").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_opens_with_a_sentence(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "the tree of the README needs it"


@pytest.mark.skipif(not EXAMPLES, reason="there are no examples")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_every_example_is_mentioned_in_the_guide(example):
    assert any(f"examples/{example.name}" in page.read_text() for page in GUIDE)


@pytest.mark.parametrize("page", GUIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def fenced(page, language):
    return re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```$", page.read_text())


@pytest.mark.parametrize("page", GUIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_in_the_guide_are_right(page):
    for text in fenced(page, "yaml"):
        if "merge_method:" in text and "models:" in text and not text.startswith("rules:"):
            mergetool.load(inspect.cleandoc(text))


@pytest.mark.parametrize("page", GUIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_guide_exist(page):
    pieces = [*fenced(page, "sh"), *re.findall(r"`(mergetool [^`]+)`", page.read_text())]
    for command in re.findall(r"(?m)^mergetool (?:--debug )?([\w-]+.*(?:\\\n.*)*)", "\n".join(pieces)):
        name, *words = command.split()
        if name == "COMMAND":
            continue
        assert name in COMMANDS, command
        known = {spelling for option in commands.get_command(None, name).params for spelling in option.opts}
        assert {word for word in words if word.startswith("--")} <= known, command
