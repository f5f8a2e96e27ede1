"""``mergetool run``: from a recipe to a merged model folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergetool.cli import options


@click.command("run")
@options.recipe
@options.output
@options.overrides
@options.memory
@options.shard_size
@options.workers
@options.device
@click.option("--force", is_flag=True, help="Replace an output folder that another recipe made.")
@click.option("--allow-nonfinite", is_flag=True, help="Go on where a source or the result has a NaN or an infinity.")
@click.option("--quiet", is_flag=True, help="Show no progress and print nothing at the end but notes.")
@options.as_json
def command(
    recipe: Path,
    output: Path | None,
    overrides: tuple[str, ...],
    memory: int | None,
    shard_size: int,
    workers: int | None,
    device: str,
    force: bool,
    allow_nonfinite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge models as RECIPE says.

    The merged model is written to the folder OUTPUT, by default the one that the recipe names. The folder
    appears under its name when it is complete. After an interruption the same command continues.

    \b
    Example:
      mergetool run merge.yaml merged/
      mergetool run merge.yaml merged/ --set parameters.normalize=false
    """
    from mergetool.cli import summary
    from mergetool.errors import RecipeError
    from mergetool.execute.progress import progress
    from mergetool.execute.run import run
    from mergetool.plan import check

    plan = check(recipe, overrides, memory=memory, shard_size=shard_size, workers=workers, output=output)
    if plan.output is None:
        raise RecipeError("there is no output folder", str(recipe), "name it after the recipe, or add `output: …`")
    report = run(
        plan,
        device=device,
        force=force,
        allow_nonfinite=allow_nonfinite,
        progress=progress(quiet or as_json),
    )
    if as_json:
        click.echo(json.dumps(summary.as_json(report), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(summary.lines(report, quiet)), nl=not quiet or bool(report.notes))
