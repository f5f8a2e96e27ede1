"""``mergetool facts``: what a folder of facts holds."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergetool.cli import options


@click.command("facts")
@click.argument("action", type=click.Choice(["show"]), metavar="show")
@click.argument("folder", type=click.Path(path_type=Path))
@options.as_json
def command(action: str, folder: Path, as_json: bool) -> None:
    """Show what was measured of models.

    FOLDER is a folder of facts, as stages that measure leave them in the cache. Its kind is shown, what it was
    measured from, and of every tensor the shape, the type and a few numbers.

    \b
    Example:
      mergetool facts show ~/.cache/mergetool/facts/gram-0123456789abcdef0123456789abcdef
    """
    from mergetool.execute import fact_table
    from mergetool.execute.fact_folder import open_facts

    facts = open_facts(folder)
    if as_json:
        click.echo(json.dumps(fact_table.as_json(facts), indent=1, ensure_ascii=False))
    else:
        click.echo(fact_table.table(facts))
