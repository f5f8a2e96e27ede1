"""The help of every command as a page of the documentation."""

from __future__ import annotations

import inspect
import re

import click

from mergetool.cli.group import COMMANDS
from mergetool.cli.group import mergetool as commands
from mergetool.cli.markdown import fenced, join, table


def cli_page() -> str:
    """The help of every command."""
    parts = ["# Commands"]
    group = click.Context(commands, info_name="mergetool")
    for name in ("", *COMMANDS):
        command = commands.get_command(group, name) if name else commands
        assert command is not None
        context = click.Context(command, info_name=name, parent=group) if name else group
        usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
        options = [p for p in command.params if isinstance(p, click.Option)]
        listed = table(("option", "default", "meaning"), [_option(o) for o in options]) if options else ""
        text = inspect.cleandoc(command.help or "")
        text = re.sub(
            r"\x08\nExample:\n((?:  .*\n?)+)", lambda found: "\n" + fenced(inspect.cleandoc(found[1]), "sh"), text
        )
        parts += [f"## {context.command_path}", fenced(usage), text, listed]
    return join(parts)


def _option(option: click.Option) -> tuple[str, str, str]:
    value = "" if option.is_flag else f" {option.metavar or option.make_metavar(click.Context(commands))}"
    shown = option.default if isinstance(option.default, str | int) and not option.is_flag else ""
    return f"`{', '.join(option.opts)}{value}`", f"`{shown}`" if shown != "" else "", option.help or ""
