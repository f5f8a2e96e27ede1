"""``mergetool report``: the report of a merged model, drawn again."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def command(folder: Path, output: Path) -> None:
    """Draw the report of a merge again, from its numbers.

    FOLDER is a merged model whose run left a report: all that turned, measured, trained, tried or corrected
    something first. The page and the pictures are written to the folder OUTPUT; the model's own stay as they are.

    \b
    Example:
      mergetool report merged/ pictures/
    """
    from mergetool.publish.page import redraw

    for path in redraw(folder, output):
        click.echo(str(path))
