"""``mergetool schema``: the JSON schema of recipes."""

from __future__ import annotations

import json

import click


@click.command("schema")
def command() -> None:
    """Print the JSON schema of recipes.

    With it, editors complete and check them.

    \b
    Example:
      mergetool schema > recipe.schema.json
    """
    from mergetool.recipe import schema

    click.echo(json.dumps(schema(), indent=2, ensure_ascii=False))
