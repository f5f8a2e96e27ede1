"""The command line: one file per command, no logic."""


def main() -> None:
    """Run the command line; the installed ``mergetool`` command is this."""
    from mergetool.cli.group import mergetool

    mergetool(prog_name="mergetool")
