"""Every argument and option that commands share, with its one help text."""

from __future__ import annotations

from pathlib import Path

import click

from mergetool.cli import sizes

recipe = click.argument("recipe", type=click.Path(path_type=Path))
output = click.argument("output", required=False, type=click.Path(path_type=Path))
overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the recipe: models.0.parameters.weight=0.3. May be given several times.",
)
memory = click.option(
    "--memory",
    callback=sizes.size,
    metavar="SIZE",
    help="The most memory to take; by default a small part of the machine's.",
)
shard_size = click.option(
    "--shard-size",
    callback=sizes.size,
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="The most bytes of weights in one output file.",
)
workers = click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Threads; by default one for each core."
)
device = click.option(
    "--device",
    metavar="DEVICE",
    callback=sizes.device,
    default="cpu",
    show_default=True,
    help="Where to compute: cpu, cuda, cuda:N, or several as cuda:0,cuda:1.",
)
force = click.option("--force", is_flag=True, help="Replace an output folder that another recipe made.")
trust_code = click.option(
    "--trust-code", is_flag=True, help="Run the code of the recipe's calibration adapter; read it first."
)
quiet = click.option("--quiet", is_flag=True, help="Show no progress and print nothing at the end but notes.")
part = click.option(
    "--part",
    callback=sizes.part,
    metavar="N/OF",
    help="Make one part of so many, as 2/8; `mergetool finish` puts them together.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
