"""Models made once for all tests of runs, and folders read back without the product's own reader."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
from plan.models import trio

from mergetool.storage.dtypes import DTYPES


def contents(folder):
    """Every file of a folder by its relative name; where the recipe lies from there is left out."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "provenance.json" in found:
        found["provenance.json"] = re.sub(rb'"recipe_folder": "[^"]*",', b"", found["provenance.json"])
    return found


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
