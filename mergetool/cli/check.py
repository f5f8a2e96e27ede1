"""``mergetool check``: whether a recipe and its models are right."""

from __future__ import annotations

from pathlib import Path

import click

from mergetool.cli import options


@click.command("check")
@options.recipe
@options.overrides
@options.memory
def command(recipe: Path, overrides: tuple[str, ...], memory: int | None) -> None:
    """Say whether RECIPE can run.

    If not, everything that is wrong with it and with its models is told, with line and column.

    \b
    Example:
      mergetool check merge.yaml
    """
    from mergetool.plan import check
    from mergetool.plan.columns import plural, size

    plan = check(recipe, overrides, memory=memory)
    click.echo(
        f"OK: {plan.recipe.merge_method}, {plural(len(plan.sources), 'model')}, "
        f"{plural(len(plan.jobs), 'tensor')}, {size(plan.bytes_written)} to write"
    )
