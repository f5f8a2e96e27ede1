"""Merges in a process of its own: warm, slowed down, and ready to be killed at a known moment.

Reads ``RECIPE OUTPUT`` lines; for each it forks a child that merges and waits a little before every write. The child
says its process's number first, then a line for each write, then ``done``.
"""

import os
import sys
import time
from pathlib import Path

import mergetool
from mergetool.storage import system


def merge(recipe, output):
    mergetool.run(mergetool.build(mergetool.load(Path(recipe)), workers=2), output)


def slowly(call):
    def wait_and_call(*arguments):
        os.write(1, b"write\n")
        time.sleep(0.004)
        return call(*arguments)

    return wait_and_call


def main():
    merge(sys.argv[1], sys.argv[2])  # loads what every child needs
    os.write(1, b"ready\n")
    for line in sys.stdin:
        recipe, output = line.split()
        child = os.fork()
        if not child:
            os.write(1, f"{os.getpid()}\n".encode())
            for name in ("pwrite", "fsync", "rename", "allocate"):
                setattr(system, name, slowly(getattr(system, name)))
            merge(recipe, output)
            os.write(1, b"done\n")
            os._exit(0)
        os.waitpid(child, 0)
        os.write(1, b"ended\n")


if __name__ == "__main__":
    main()
