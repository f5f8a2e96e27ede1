"""``mergetool evaluate``: how well models predict texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from mergetool.cli import options


def _texts(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """The callback of ``--data``: names to files."""
    texts: dict[str, Path] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise click.BadParameter(f"{value!r} must be a name, `=` and a file: prose=prose.txt", context, option)
        if name in texts:
            raise click.BadParameter(f"{name!r} is named twice", context, option)
        texts[name] = Path(file)
    return texts


@click.command("evaluate")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--data",
    metavar="NAME=FILE",
    multiple=True,
    required=True,
    callback=_texts,
    help="A UTF-8 text to predict, with a name for the table. May be given several times.",
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Windows at once.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of a window; by default what all the models can take, at most 2048.",
)
@options.device
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    default="float32",
    show_default=True,
    metavar="DTYPE",
    help="What the weights are loaded in: float32, bfloat16, float16 or float64.",
)
@click.option("--limit", type=click.IntRange(min=2), metavar="N", help="Take only the first N tokens of each text.")
@options.as_json
def command(
    models: tuple[str, ...],
    data: dict[str, Path],
    batch: int,
    context: int | None,
    device: str,
    dtype: str,
    limit: int | None,
    as_json: bool,
) -> None:
    """Compare language models on texts.

    Each MODEL is a folder or a repository on the Hub. The tables show the mean negative log-likelihood in nats
    a token, and its exponential, the perplexity; lower is better. Models with different tokenizers do not
    compare.

    \b
    Example:
      mergetool evaluate base/ merged/ --data prose=prose.txt --data code=code.txt
    """
    from mergetool.execute.evaluate import evaluate, table

    scores = evaluate(models, data, context=context, batch=batch, device=device, dtype=dtype, limit=limit)
    if as_json:
        found = [{**dataclasses.asdict(score), "perplexity": score.perplexity} for score in scores]
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        click.echo(table(scores))
