"""Models made once for all tests of runs, and folders read back without the product's own reader."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from plan.models import TIES, trio

from mergetool.storage.dtypes import DTYPES


def contents(folder):
    """Every file of a folder by its relative name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder):
    """The tensors of a model folder: by name the dtype and the raw elements in their shape."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                values = np.frombuffer(raw[start + first : start + last], DTYPES[entry["dtype"]].storage)
                count = -1 if DTYPES[entry["dtype"]].bits >= 8 else None
                found[name] = entry["dtype"], values.reshape(entry["shape"]) if count else values
    return found


def fingerprint(folder):
    """The content and the times of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The models ``base``, ``a`` and ``b`` that no test changes; each test writes its own output."""
    return trio(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def folder(tmp_path):
    """The same three models, the test's own."""
    return trio(tmp_path)


class Runner:
    """A process that merges slowly in children, see ``runner.py``."""

    def __init__(self, recipe, scratch):
        command = [sys.executable, str(Path(__file__).with_name("runner.py")), str(recipe), str(scratch)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        if self.process.stdout.readline() != "ready\n":
            self.stop()
            pytest.fail("the process that merges slowly did not start")

    def start(self, recipe, output):
        """Begin a merge; the number of the process that makes it."""
        self.process.stdin.write(f"{recipe} {output}\n")
        return int(self.process.stdout.readline())

    def wait_for(self, writes):
        """Wait until so many writes have begun; whether there were as many."""
        return all(self.process.stdout.readline() == "write\n" for _ in range(writes))

    def writes(self):
        """Wait for the end of the merge; how many writes it took."""
        lines = list(iter(self.process.stdout.readline, "done\n"))
        assert self.process.stdout.readline() == "ended\n"
        return len(lines)

    def kill(self, child, how):
        """Kill the process that merges, and wait until it is gone; False where it had come to its end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, how)
        lines = list(iter(self.process.stdout.readline, "ended\n"))
        return "done\n" not in lines

    def stop(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def runner(shared, tmp_path_factory):
    """The process that merges slowly; one for all tests, for it takes seconds to start."""
    recipe = tmp_path_factory.mktemp("runner") / "merge.yaml"
    recipe.write_text(re.sub(r"(model: )(base|a|b)\b", rf"\g<1>{shared}/\g<2>", f"{TIES}  scope: model\n"))
    started = Runner(recipe, recipe.with_name("merged"))
    yield started
    started.stop()
