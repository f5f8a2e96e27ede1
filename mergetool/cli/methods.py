"""``mergetool methods``: the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mergetool.methods import Method


@click.command("methods")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the merge methods, or explain one.

    \b
    Example:
      mergetool methods
      mergetool methods ties
    """
    from mergetool.methods import METHODS
    from mergetool.plan.columns import paragraph
    from mergetool.recipe.spelling import did_you_mean

    if name is None:
        width = max(map(len, METHODS)) + 2
        click.echo("\n".join(paragraph(m.summary, width, m.name) for m in METHODS.values()))
    elif name in METHODS:
        click.echo(_page(METHODS[name]))
    else:
        raise click.BadParameter(f"there is no method `{name}`; {did_you_mean(name, METHODS)}", param_hint="NAME")


def _page(method: Method) -> str:
    from mergetool.plan.columns import paragraph

    lines = [f"{method.title} ({method.name})", "", method.text.replace("``", "`")]
    if method.parameters:
        lines += ["", "Parameters:"]
    for parameter in method.parameters.values():
        scope = "one value per source" if parameter.per_source else "one value"
        default = "required" if parameter.required else f"default {word(parameter.default)}"
        lines += [f"  {parameter.name}: {parameter.kind}; {scope}; {default}", paragraph(parameter.description, 6)]
    for head, text in (
        ("Models:", sources(method)),
        ("Differences:", method.differs),
        ("Paper:", " ".join(part for part in (method.citation, method.paper and f"({method.paper})") if part)),
    ):
        if text:
            lines += ["", head, paragraph(text)]
    return "\n".join(lines)


def sources(method: Method) -> str:
    """How many models a method takes, and what it takes the base for."""
    base = {
        "required": "It takes deltas from `base_model`, which must be set.",
        "optional": "A `base_model` may be set.",
        "ignored": "A `base_model` only lends its config and tokenizer, unless it is among the models.",
    }[method.base]
    many = f"{method.fewest} or more" if method.most is None else f"{method.fewest} to {method.most}"
    if method.fewest == method.most:
        many = f"exactly {method.fewest}"
    return f"{many}{' besides the base' if method.base == 'required' else ''}. {base}"


def word(value: object) -> str:
    """A value as recipes write it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
