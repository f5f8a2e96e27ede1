"""``mergetool finish``: from the parts of a run to a merged model folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mergetool.cli import options


@click.command("finish")
@options.recipe
@options.output
@options.overrides
@options.memory
@options.shard_size
@options.workers
@options.force
@options.quiet
@options.as_json
def command(
    recipe: Path,
    output: Path | None,
    overrides: tuple[str, ...],
    memory: int | None,
    shard_size: int,
    workers: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Put the parts of a run together.

    Give RECIPE, OUTPUT, --set and --shard-size as for the parts. Every tensor is read back and checked, and the
    folder gets its name: the same bytes as from one run. If anything is missing, the exit code is 4 and the
    parts to run again are named.

    \b
    Example:
      mergetool run merge.yaml merged/ --part 1/2
      mergetool run merge.yaml merged/ --part 2/2
      mergetool finish merge.yaml merged/
    """
    from mergetool.cli import summary
    from mergetool.errors import RecipeError
    from mergetool.execute.parts import finish
    from mergetool.execute.progress import progress
    from mergetool.plan import check

    plan = check(recipe, overrides, memory=memory, shard_size=shard_size, workers=workers, output=output)
    if plan.output is None:
        raise RecipeError("there is no output folder", str(recipe), "name it after the recipe, or add `output: …`")
    report = finish(plan, force=force, progress=progress(quiet or as_json))
    if as_json:
        click.echo(json.dumps(summary.as_json(report), indent=1, ensure_ascii=False))
    else:
        lines = summary.finish_lines(report, quiet)
        click.echo("\n".join(lines), nl=bool(lines))
