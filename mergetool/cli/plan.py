"""``mergetool plan``: what a run would do."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergetool.cli import options


@click.command("plan")
@options.recipe
@options.output
@options.overrides
@options.memory
@options.shard_size
@options.workers
@click.option("--tensor", metavar="NAME", help="Show all about one output tensor.")
@options.as_json
def command(
    recipe: Path,
    output: Path | None,
    overrides: tuple[str, ...],
    memory: int | None,
    shard_size: int,
    workers: int | None,
    tensor: str | None,
    as_json: bool,
) -> None:
    """Show what running RECIPE would do.

    Headers and configs are read, weights are not, and nothing is written.

    \b
    Example:
      mergetool plan merge.yaml
      mergetool plan merge.yaml --tensor model.norm.weight
    """
    from mergetool.plan import check, show

    plan = check(recipe, overrides, memory=memory, shard_size=shard_size, workers=workers, output=output)
    if as_json:
        data = show.as_json(plan)
        if tensor is not None:
            show.job(plan, tensor)  # refuses a name that is not in the plan
            data = next(job for job in data["jobs"] if job["name"] == tensor)
        click.echo(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        click.echo(show.table(plan) if tensor is None else show.job(plan, tensor))
