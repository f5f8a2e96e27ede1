"""``mergetool verify``: whether a merged folder is what its recipe makes."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mergetool.cli import options


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="Merge so many tensors again and compare their bytes.",
)
@click.option(
    "--recipe-folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Where the recipe's relative paths start from, if the model or its recipe was moved.",
)
@options.device
@options.trust_code
def command(folder: Path, sample: int, recipe_folder: Path | None, device: str, trust_code: bool) -> None:
    """Check a merged model.

    Every byte in FOLDER is compared with the record that the run left there, and some tensors are merged
    again from the sources where these can still be found. The exit code is 4 if anything is wrong. Of a folder
    that holds a model for each task, each is checked.

    \b
    Example:
      mergetool verify merged/ --sample 20
    """
    from mergetool.execute.each_task import folders
    from mergetool.execute.verify import SKIPPED, verify
    from mergetool.plan.columns import paragraph

    every = folders(folder)
    sound = True
    for each in every:
        if len(every) > 1:
            click.echo(str(each))
        found = verify(each, sample, device, recipe_folder, trust_code)
        for check in found.checks:
            word = "skipped" if check.skipped else "ok" if check.ok else "WRONG"
            head = f"{word:<8} {check.name:<8} "
            click.echo(paragraph(check.detail.removeprefix(SKIPPED), len(head), head))
        sound &= found.ok
    if not sound:
        sys.exit(4)
