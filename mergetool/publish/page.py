"""The report of a run as files: one page that holds everything itself, the pictures, and the numbers behind them."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergetool.errors import CheckpointError, OutputRefused
from mergetool.publish.drawing import draw
from mergetool.publish.sections import Cell, Section, as_json, from_json
from mergetool.storage.writer import atomic_write
from mergetool.version import __version__

PAGE = "report.html"
"""The page's name in a model folder."""
FOLDER = "report"
"""The name in a model folder of the folder with the pictures and the numbers."""
NUMBERS = f"{FOLDER}/report.json"
"""Where the numbers are, seen from the model folder."""
_LONGEST = 2_000
"""Rows of a table on the page; the file has them all."""


@dataclass(frozen=True)
class Drawn:
    """The files of a report.

    Attributes:
        files: their content, by their names in the model folder.
        pictures: which of them are pictures, each with its title.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)


def picture(section: Section) -> str:
    """Where a section's picture is, seen from the model folder."""
    return f"{FOLDER}/{section.name}.png"


def numbers_file(sections: Sequence[Section], title: str) -> bytes:
    """The content of ``report.json``."""
    content = {"title": title, **as_json(sections)}
    return (json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def draw_report(sections: Sequence[Section], title: str) -> Drawn:
    """All files of a report.

    Args:
        sections: what it shows.
        title: what was run.

    Raises:
        ImportError: there is no matplotlib.
    """
    pictures = {picture(section): draw(section) for section in sections}
    page = _page(sections, title, pictures).encode()
    titles = {picture(section): section.title for section in sections}
    return Drawn({PAGE: page, NUMBERS: numbers_file(sections, title), **pictures}, titles)


def redraw(folder: Path, output: Path) -> tuple[Path, ...]:
    """Draw the report of a model folder again, into another folder.

    Args:
        folder: a model folder with a report.
        output: where the page, the pictures and the numbers go.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: the folder has no report, or one that cannot be read.
        OutputRefused: the output is a model folder that mergetool made, or cannot be written.
        RunError: the disk is full or fails.
    """
    from mergetool.publish.provenance import PROVENANCE  # it names this page

    if output.resolve() == folder.resolve() or (output / PROVENANCE).exists():
        what = "is a model folder, whose files are on record as they are"
        raise OutputRefused(what, str(output), "name another folder")
    source = folder / NUMBERS
    try:
        data = json.loads(source.read_bytes())
    except FileNotFoundError:
        fix = "runs that turn, measure or train something leave one"
        raise CheckpointError(f"has no report: there is no {NUMBERS}", str(folder), fix) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", str(source)) from error
    made = draw_report(from_json(data, str(source)), data.get("title", "Report"))
    try:
        (output / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(f"cannot be written: {error.strerror or error}", str(output)) from error
    for name, content in made.files.items():
        atomic_write(output / name, content)
    return tuple(output / name for name in made.files)


def _page(sections: Sequence[Section], title: str, pictures: Mapping[str, bytes]) -> str:
    data = base64.b64encode(numbers_file(sections, title)).decode()
    contents = "".join(f'<li><a href="#{s.name}">{html.escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(_section(section, pictures[picture(section)]) for section in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>What mergetool {__version__} turned, measured or trained before it merged these models, and what that came to.
All numbers: <a download="report.json" href="data:application/json;base64,{data}">report.json</a>.</p>
<ol>{contents}</ol>
{body}
</body>
</html>
"""


def _section(section: Section, png: bytes) -> str:
    image = base64.b64encode(png).decode()
    return f"""<section id="{html.escape(section.name)}">
<h2>{html.escape(section.title)}</h2>
<p class="found">{_text(section.found)}</p>
<img alt="{html.escape(section.title)}" src="data:image/png;base64,{image}">
<p><b>How to read it.</b> {_text(section.reading)}</p>
<p><b>A bad sign.</b> {_text(section.warning)}</p>
{"".join(_table(section))}</section>"""


def _text(text: str) -> str:
    """Prose, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _table(section: Section) -> Iterator[str]:
    if not section.rows:
        return
    head = "".join(f"<th>{html.escape(name)}</th>" for name in section.columns)
    count = f"{len(section.rows):,} rows"
    if len(section.rows) > _LONGEST:
        count += f", the first {_LONGEST:,} of which are here"
    yield f"<details><summary>The numbers: {count}</summary>\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
    for row in section.rows[:_LONGEST]:
        yield f"<tr>{''.join(map(_cell, row))}</tr>\n"
    yield "</tbody>\n</table>\n</details>\n"


def _cell(value: Cell) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    return f'<td class="number">{value:.4g}</td>' if isinstance(value, float) else f'<td class="number">{value:,}</td>'


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid #ddd;
  padding-top: 1rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.found { font-weight: 500; }
details { margin: 1rem 0; overflow-x: auto; } summary { cursor: pointer; color: #444; }
table { border-collapse: collapse; font-size: .85rem; margin-top: .5rem; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #eee; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
a { color: #0062a3; }
"""
