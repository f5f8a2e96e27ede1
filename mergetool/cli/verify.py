"""``mergetool verify``: whether a merged folder is what its recipe makes."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sample", type=click.IntRange(min=0), metavar="N", help="Merge N tensors again and compare.")
def command(folder: Path, sample: int | None) -> None:
    """Check a merged model in FOLDER against its own record.

    \b
    Example:
      mergetool verify merged/ --sample 5
    """
