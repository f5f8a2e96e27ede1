"""The little Markdown that the reference pages are made of."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; bars in its cells are escaped."""
    lines = [list(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fenced(text: str, language: str = "text") -> str:
    """Text as it is, in a monospaced face."""
    return f"```{language}\n{text}\n```"


def anchor(head: str) -> str:
    """The address of a heading on its page."""
    return re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")


def join(parts: Iterable[str]) -> str:
    """Paragraphs with an empty line between them; empty ones are left out."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def markdown(docstring: str) -> str:
    """A docstring as Markdown: sections as lists, roles as names, sessions as code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring.replace("``", "`"))
    text = re.sub(r"(?m)^(?:>>> .*\n?(?:(?!>>>|\n).+\n?)*)+", lambda s: fenced(s[0].strip(), "python") + "\n", text)
    return re.sub(r"(?m)^(\w+):\n((?:    .*\n?)+)", lambda s: f"**{s[1]}**\n\n{_items(inspect.cleandoc(s[2]))}\n", text)


def _items(section: str) -> str:
    return re.sub(r"(?m)^([\w*]+):", r"- `\1`:", section)
