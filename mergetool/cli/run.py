"""``mergetool run``: from a recipe to a merged model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
@options.part
@options.force
@click.option("--allow-nonfinite", is_flag=True, help="Go on where a source or the result has a NaN or an infinity.")
@options.trust_code
@options.quiet
@options.as_json
def command(
    recipe: Path,
    output: Path | None,
    overrides: tuple[str, ...],
    memory: int | None,
    shard_size: int,
    workers: int | None,
    device: str,
    part: tuple[int, int] | None,
    force: bool,
    allow_nonfinite: bool,
    trust_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge models as RECIPE says.

    The merged model is written to the folder OUTPUT, by default the one that the recipe names. The folder
    appears under its name when it is complete. After an interruption the same command continues.

    With --part the work is divided: every part is a command of its own, on any machine that sees the same
    files, and `mergetool finish` completes the folder.

    \b
    Example:
      mergetool run merge.yaml merged/
      mergetool run merge.yaml merged/ --set parameters.normalize=false
      mergetool run merge.yaml merged/ --part 2/8
    """
    from mergetool.cli import summary
    from mergetool.errors import RecipeError
    from mergetool.execute.parts import run_part
    from mergetool.execute.progress import progress
    from mergetool.execute.run import run
    from mergetool.plan import check
    from mergetool.plan.parts import Share

    plan = check(recipe, overrides, memory=memory, shard_size=shard_size, workers=workers, output=output)
    if plan.output is None:
        raise RecipeError("there is no output folder", str(recipe), "name it after the recipe, or add `output: …`")
    how: dict[str, Any] = {
        "device": device,
        "force": force,
        "allow_nonfinite": allow_nonfinite,
        "trust_code": trust_code,
    }
    how["progress"] = progress(quiet or as_json)
    if part is None:
        report = run(plan, **how)
        data, lines = summary.as_json(report), summary.lines(report, quiet)
    else:
        made = run_part(plan, Share(*part), **how)
        data, lines = summary.part_as_json(made), summary.part_lines(made, str(recipe), quiet)
    if as_json:
        click.echo(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(lines), nl=bool(lines))
