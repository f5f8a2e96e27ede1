"""A folder of facts appears when it is complete, under a digest of what it was made from."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from mergetool.cache import cache_folder
from mergetool.errors import CheckpointError, OutputRefused
from mergetool.execute import fact_folder
from mergetool.execute.fact_folder import Facts, digest, open_facts
from mergetool.execute.fact_making import Making, facts_folder
from mergetool.execute.fact_table import as_json, condition, table

MADE_OF = {"model": "base", "data": "prose"}


def made(root, made_of=MADE_OF, **tensors):
    values = tensors or {"w:gram": np.eye(3, dtype=np.float32), "w:count": np.array(7.0)}
    with facts_folder("gram", made_of, root, "./base") as folder:
        assert isinstance(folder, Making)
        folder.add("layers.0", values, {"v": "w"})
        return folder.finish(("a note",))


def test_facts_are_read_by_the_names_on_disk(tmp_path):
    facts = made(tmp_path)
    assert facts.names == ("v", "w")
    assert facts.fields("v") == ("count", "gram")
    np.testing.assert_array_equal(facts.get("v", "gram"), np.eye(3))
    assert facts.get("w", "count") == 7
    assert open_facts(facts.path) == facts
    with pytest.raises(CheckpointError, match="holds no `mean` of `w`"):
        facts.get("w", "mean")


def test_the_folder_is_named_by_all_that_decides_its_content(tmp_path, monkeypatch):
    facts = made(tmp_path)
    assert facts.path == tmp_path / f"gram-{digest('gram', MADE_OF)}"
    assert digest("gram", {"data": "prose", "model": "base"}) == digest("gram", MADE_OF)
    others = {digest("moments", MADE_OF), digest("gram", {**MADE_OF, "data": "code"})}
    monkeypatch.setattr(fact_folder, "FORMAT", fact_folder.FORMAT + 1)
    assert digest("gram", MADE_OF) not in {*others, facts.path.name.removeprefix("gram-")}


def test_the_cache_is_where_it_is_told_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGETOOL_CACHE", str(tmp_path))
    assert cache_folder("facts") == tmp_path / "facts"
    monkeypatch.delenv("MERGETOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_folder("facts") == tmp_path / "c" / "mergetool" / "facts"


def test_only_complete_folders_are_there(tmp_path):
    with facts_folder("gram", MADE_OF, tmp_path) as folder:
        folder.add("layers.0", {"w:count": np.array(1.0)}, {})
        assert not list(tmp_path.glob("gram-*"))
    with facts_folder("gram", MADE_OF, tmp_path) as folder:
        assert folder.steps == {"layers.0": "0000.safetensors"}
        folder.add("layers.1", {"x:count": np.array(2.0)}, {})
        facts = folder.finish()
    assert (facts.get("w", "count"), facts.get("x", "count")) == (1, 2)
    assert [each.name for each in tmp_path.iterdir()] == [facts.path.name]
    assert {each.name for each in facts.path.iterdir()} == {"facts.json", "0000.safetensors", "0001.safetensors"}
    with facts_folder("gram", MADE_OF, tmp_path) as again:
        assert isinstance(again, Facts)


def test_who_wants_the_same_waits_for_it(tmp_path):
    found = []

    def second():
        with facts_folder("gram", MADE_OF, tmp_path) as folder:
            found.append(folder)

    with facts_folder("gram", MADE_OF, tmp_path) as folder:
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        folder.add("all", {"w:count": np.array(1.0)}, {})
        folder.finish()
    waiting.join(30)
    assert isinstance(found[0], Facts)


def test_what_is_no_folder_of_facts_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no folder of facts"):
        open_facts(tmp_path)
    facts = made(tmp_path)
    (facts.path / "facts.json").write_text('{"kind": "gram"')
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_facts(facts.path)
    (facts.path / "facts.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_facts(facts.path)


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputRefused, match="MERGETOOL_CACHE"), facts_folder("gram", MADE_OF, tmp_path / "file"):
        pass


def test_the_table_tells_what_a_reader_checks_first(tmp_path):
    facts = made(tmp_path)
    text = table(facts)
    for words in (
        'data     "prose"',
        "fact     gram",
        "count    7",
        "w  3×3  trace 3, condition 1",
        "v  w",
        "note: a note",
    ):
        assert words in text, text
    data = json.loads(json.dumps(as_json(facts)))
    assert data["tensors"][1]["numbers"] == {"trace": 3, "condition": 1}
    assert data["made_of"] == MADE_OF


def test_a_singular_matrix_has_no_condition(tmp_path):
    facts = made(tmp_path, **{"w:gram": np.ones((4, 4), np.float32), "e:gram": np.zeros((2, 3, 3), np.float32)})
    numbers = {tensor["name"]: tensor["numbers"] for tensor in as_json(facts)["tensors"]}
    assert numbers["w:gram"] == {"trace": 4, "condition": None}
    assert numbers["e:gram"] == {"trace": 0, "condition": None}


def test_the_condition_of_a_large_matrix_is_estimated():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(600, 600)))[0]
    gram = (basis * np.geomspace(1, 10, 600)) @ basis.T
    assert condition(gram.astype(np.float32)) == pytest.approx(10, rel=0.2)


def test_a_permutation_is_told_by_what_moves_and_what_that_gains(tmp_path):
    tensors = {"mlp:permutation": np.array([0, 2, 1, 3]), "mlp:scores": np.array([0.25, 0.98, 0.5])}
    facts = made(tmp_path, **tensors, **{"w:gram": np.eye(2, dtype=np.float32)})
    text = table(facts)
    assert "mlp  permutation  4    moved 2" in text
    assert "mlp  scores       3    0.250 → 0.980 of a perfect match, 50.0% moved" in text


def test_names_of_one_layer_are_told_apart(tmp_path):
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight" for i in range(2) for j in range(3)]
    tensors = {f"{name}:squared_gradient": np.full((40, 140), 0.0123456, np.float32) for name in names}
    lines = [line for line in table(made(tmp_path, **tensors)).splitlines() if "0.0123" in line]
    assert len(set(lines)) == len(names)
    assert all(len(line) <= 100 for line in lines)


def test_ranges_are_told_of_everything_else(tmp_path):
    facts = made(tmp_path, **{"w:mean": np.array([1, 2, 6], np.float32), "w:empty": np.zeros(0, np.float32)})
    numbers = {tensor["name"]: tensor["numbers"] for tensor in as_json(facts)["tensors"]}
    assert numbers == {"w:mean": {"least": 1, "mean": 3, "largest": 6}, "w:empty": {}}
