"""``mergetool facts show``: what a folder of facts holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mergetool.execute.fact_making import facts_folder


@pytest.fixture
def facts(tmp_path):
    with facts_folder("gram", {"model": "base"}, tmp_path) as folder:
        folder.add("layers.0", {"w:gram": 2 * np.eye(3, dtype=np.float32), "w:count": np.array(5.0)}, {"v": "w"})
        return folder.finish()


def test_facts_are_shown(facts, run):
    result = run("facts", "show", facts.path)
    assert result.exit_code == 0, result.stderr
    assert "trace 6, condition 1" in result.stdout
    assert 'model    "base"' in result.stdout


def test_facts_are_data_for_scripts(facts, run):
    found = json.loads(run("facts", "show", facts.path, "--json").stdout)
    assert found["kind"] == "gram"
    assert found["aliases"] == {"v": "w"}
    assert [tensor["name"] for tensor in found["tensors"]] == ["w:count", "w:gram"]


def test_another_folder_is_no_folder_of_facts(tmp_path, run):
    result = run("facts", "show", tmp_path)
    assert result.exit_code == 3
    assert "no folder of facts" in result.stderr


def test_what_can_be_done_with_facts_is_told(tmp_path, run):
    result = run("facts", "burn", tmp_path)
    assert result.exit_code == 2
    assert "'burn' is not 'show'" in result.stderr
