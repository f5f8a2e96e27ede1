"""What the user is told when something goes wrong, and the exit code that scripts see."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click

from mergetool.errors import MergetoolError

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the signal's number, as shells count."""
BROKEN_PIPE = 141
"""The exit code when whoever read the output stopped reading; the same count."""
UNWRITTEN = 74
"""The exit code when standard output cannot be written, as to a full disk: ``EX_IOERR``."""
UNEXPECTED = 70
"""The exit code of a mistake in mergetool itself: ``EX_SOFTWARE``."""


def tell(error: BaseException, debug: bool, command: str | None) -> int:
    """Print an error and return the exit code.

    Args:
        error: what was raised.
        debug: whether to print its traceback first.
        command: the command that was running.
    """
    if isinstance(error, BrokenPipeError):
        _discard()
        return BROKEN_PIPE
    if debug:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, KeyboardInterrupt):
        click.echo("interrupted" + ("; the same command continues from here" if command == "run" else ""), err=True)
        return INTERRUPTED
    if isinstance(error, MergetoolError):
        for problem in error.problems:
            _message(str(problem))
        if len(error.problems) > 1:
            click.echo(f"{len(error.problems)} problems", err=True)
        return error.exit_code
    if isinstance(error, OSError) and _of_printing(error):
        _discard()
        try:
            _message(f"the output cannot be printed: {error.strerror or error}")
        except OSError:  # messages go to the same disk
            _discard(sys.stderr)
        return UNWRITTEN
    _message(f"unexpected {type(error).__name__}: {error}")
    advice = "this is a mistake in mergetool: please report it" + (
        ", with the traceback above" if debug else f", with what `mergetool --debug {command or ''} …` prints"
    )
    click.echo(f"    {advice}", err=True)
    return UNEXPECTED


@contextlib.contextmanager
def warned() -> Iterator[None]:
    """Tell mergetool's own warnings as errors are told, without a line of code; those of others stay as they are."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
            if Path(filename).is_relative_to(_OURS):
                _message(str(message), "warning", "yellow")
            else:
                plain(message, category, filename, *rest, **more)

        warnings.showwarning = show
        yield


_OURS = Path(__file__).parent.parent


def _message(text: str, what: str = "error", fg: str = "red") -> None:
    """One error or warning; the word is in colour on a terminal, unless NO_COLOR says otherwise."""
    color = False if os.environ.get("NO_COLOR") else None
    click.echo(click.style(f"{what}:", fg=fg, bold=True) + " " + text, err=True, color=color)


def _of_printing(error: OSError) -> bool:
    """Whether it was printing that failed, and not some file of ours."""
    return any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _discard(stream: IO[str] | None = None) -> None:
    """Drop what is left to print: the interpreter must not try to write it when it ends."""
    with contextlib.suppress(OSError):  # it need not be a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())
