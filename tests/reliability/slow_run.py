"""The command line, told of every call to the operating system: each waits a little, so that kills hit everywhere.

`python slow_run.py PIPE run RECIPE OUTPUT …` is `mergetool run RECIPE OUTPUT …` that writes a line to the descriptor
PIPE before each call: its name and the file it is about.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from mergetool.cli import main
from mergetool.storage import system

WAIT = 0.002


def told(pipe: int, name: str) -> Callable[..., Any]:
    true = getattr(system, name)

    def call(*arguments: Any) -> Any:
        if name in ("open_file", "rename"):
            path = os.fsdecode(arguments[-1 if name == "rename" else 0])
        else:
            path = os.readlink(f"/proc/self/fd/{arguments[0]}")
        os.write(pipe, f"{name} {path}\n".encode())
        time.sleep(WAIT)
        return true(*arguments)

    return call


if __name__ == "__main__":
    descriptor = int(sys.argv.pop(1))
    for function in ("open_file", "close", "preadv", "pwrite", "allocate", "fsync", "rename"):
        setattr(system, function, told(descriptor, function))
    main()
