"""``mergetool evaluate``: the loss and perplexity of models on texts."""

from __future__ import annotations

import click


@click.command("evaluate")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
def command(models: tuple[str, ...]) -> None:
    """Compare MODELs on texts.

    \b
    Example:
      mergetool evaluate merged/ base/ --data prose=prose.txt
    """
