"""The command that holds the others, each loaded only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from mergetool.cli import failure
from mergetool.version import __version__

COMMANDS = ("run", "finish", "plan", "check", "verify", "evaluate", "facts", "report", "methods", "schema")
"""Every command in the order of the help; each is ``command`` in the module of its name."""


class LazyGroup(click.Group):
    """A group whose commands are modules, imported by name, and whose errors are told without traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of that name, its module imported now."""
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"mergetool.cli.{name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first word; for one that does not exist the nearest is named."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from mergetool.recipe.spelling import did_you_mean

            raise click.UsageError(f"there is no command `{args[0]}`; {did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what goes wrong becomes a message and an exit code."""
        try:
            with failure.warned():
                return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            code = failure.tell(error, debug=ctx.params["debug"], command=ctx.invoked_subcommand)
        return ctx.exit(code)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, envvar="MERGETOOL_DEBUG", help="Print the traceback of errors.")
def mergetool(debug: bool) -> None:
    """Merge neural-network checkpoints, from a YAML recipe.

    \b
    Example:
      mergetool plan merge.yaml
      mergetool run merge.yaml merged/
    """
