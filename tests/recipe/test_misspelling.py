"""Every key of a recipe misspelled: one problem, at the key, with the right name."""

from __future__ import annotations

import re

import pytest

from mergetool.recipe import load, read
from mergetool.recipe.spelling import did_you_mean, nearest

from .full import FULL, STAGES

NOT_OURS = {"int8_mask", "python", "talk", "mixed"}
"""Accepted for mergekit's sake, so no method has it to suggest; and names that the recipe itself makes up."""
RECIPES = {"full": FULL, "stages": STAGES}
MEANING = {text: load(text).canonical() for text in RECIPES.values()}


def keys():
    for name, text in RECIPES.items():
        for number, line in enumerate(text.splitlines(), 1):
            for found in re.finditer(r"(?<![\w./])([a-z]\w*):(?= |$)", line):
                if found[1] not in NOT_OURS:
                    yield pytest.param(text, number, found.start(1), found[1], id=f"{name}-{number}-{found[1]}")


def misspellings(word: str):
    yield from (word[:i] + word[i + 1 :] for i in range(len(word)))
    swapped = (word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1))
    yield from (other for other in swapped if other != word)
    yield from (word[:i] + letter + word[i:] for i in range(len(word) + 1) for letter in "eqs")


@pytest.mark.parametrize(("text", "line", "column", "word"), list(keys()))
def test_one_problem_each(text, line, column, word):
    lines = text.splitlines()
    old = lines[line - 1]
    for other in dict.fromkeys(misspellings(word)):
        lines[line - 1] = old[:column] + other + old[column + len(word) :]
        recipe, problems = read("\n".join(lines) + "\n")
        assert len(problems) == 1, (other, problems)
        assert problems[0].where == f"<text>:{line}:{column + 1}"
        assert problems[0].fix == f"did you mean `{word}`?", other
        assert recipe is not None
        assert recipe.canonical() == MEANING[text]


def test_a_single_letter_left_out_is_one_problem_too():
    text = "merge_method: slerp\nbase_model: a\nmodels:\n  - model: b\nparameters:\n  '': 0.5\n"
    _, problems = read(text)
    assert [(problem.where, problem.fix) for problem in problems] == [("<text>:6:3", "allowed here: `t`")]
    _, problems = read(text.replace("''", "tt"))
    assert [problem.fix for problem in problems] == ["did you mean `t`?"]


def test_nearest():
    assert nearest("Base-Model", ["models", "base_model"]) == "base_model"
    assert nearest("zzz", ["models"]) is None
    assert nearest("", ["models"]) is None
    assert nearest("m" * 100, ["m" * 99]) is None
    assert did_you_mean("zzz", ["a", "b"]) == "allowed here: `a`, `b`"
    assert did_you_mean("zzz", []) == ""
