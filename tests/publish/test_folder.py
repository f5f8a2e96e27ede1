import json
import os
from dataclasses import replace

import pytest
import yaml

from mergetool.checkpoint.layout import is_tokenizer
from mergetool.publish import header_digest, read_local
from mergetool.publish.card import card
from mergetool.publish.origins import front_matter
from mergetool.publish.privacy import Privacy
from mergetool.recipe import load
from mergetool.storage.digest import file_digest
from publish.models import CONFIG, RECIPE, llama, merged, three

FILES = {
    "tokenizer.json": b'{"of": "base"}',
    "tokenizer_config.json": b'{"x": 1}',
    "generation_config.json": b'{ "temperature":0.5}\n',
    "preprocessor_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_odd.py": b"# code\r\n",
    "LICENSE": b"do as you like\xff",
    "provenance.json": b"{}",
}
DROP = "rules:\n  - where: {name: '*.layers.1.mlp.up_proj.*'}\n    drop: true\n"


def contents(folder):
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))


def readme(folder):
    return (folder / "README.md").read_text()


def record(folder):
    return json.loads((folder / "provenance.json").read_text())


def test_the_other_files_of_the_lender_come_along_byte_for_byte(tmp_path):
    three(tmp_path)
    llama(tmp_path / "base", 0, files=FILES | {"additional_chat_templates/tool.jinja": b"t"}, readme="# old card")
    found = contents(merged(tmp_path).folder)
    for name, content in FILES.items():
        assert name == "provenance.json" or found[name] == content
    assert found["additional_chat_templates/tool.jinja"] == b"t"
    assert found["config.json"] == (tmp_path / "base" / "config.json").read_bytes()
    assert found["mergetool.yaml"].decode() == RECIPE
    assert set(found) == {
        *FILES,
        "additional_chat_templates/tool.jinja",
        "config.json",
        "mergetool.yaml",
        "README.md",
        "model.safetensors",
        ".mergetool/.gitignore",
        ".mergetool/local.json",
    }
    assert "old card" not in readme(tmp_path / "merged")


def test_tokenizer_files_come_from_the_source_asked_for(tmp_path):
    three(tmp_path, files={"tokenizer.json": b'{"of": "one"}', "chat_template.jinja": b"one", "notes.txt": b""})
    llama(tmp_path / "base", 0, files=FILES)
    found = contents(merged(tmp_path, RECIPE + "tokenizer_source: one\n").folder)
    assert found["tokenizer.json"] == b'{"of": "one"}'
    assert found["chat_template.jinja"] == b"one"
    assert "tokenizer_config.json" not in found
    assert "notes.txt" not in found
    assert found["generation_config.json"] == FILES["generation_config.json"]
    assert "lends its tokenizer" in readme(tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("tokenizer.model.v3", True),
        ("spiece.model", True),
        ("vocab.txt", True),
        ("tekken.json", True),
        ("additional_chat_templates/rag.jinja", True),
        ("tokenization_qwen.py", True),
        ("config.json", False),
        ("generation_config.json", False),
        ("processor_config.json", False),
        ("1_Pooling/config.json", False),
        ("modeling_qwen.py", False),
    ],
)
def test_what_belongs_to_a_tokenizer(name, belongs):
    assert is_tokenizer(name) is belongs


def test_the_config_names_the_dtype_asked_for(tmp_path):
    folder = merged(three(tmp_path), RECIPE + "out_dtype: bfloat16\n").folder
    config = json.loads((folder / "config.json").read_text())
    assert config == CONFIG | {"torch_dtype": "bfloat16"}
    assert list(config) == list(CONFIG)


def test_without_a_config_none_is_written(tmp_path):
    three(tmp_path)
    for name in ("base", "one", "two"):
        (tmp_path / name / "config.json").unlink()
    folder = merged(tmp_path).folder
    assert not (folder / "config.json").exists()
    assert "library_name" not in front_matter(readme(folder))


def test_several_shards_have_an_index(tmp_path):
    folder = merged(three(tmp_path), shard_size=1500).folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert len(record(folder)["shards"]) > 1


def test_the_front_matter_of_the_card(tmp_path):
    three(tmp_path, readme="---\nlicense: mit\nbase_model: org/start\n---\n")
    llama(tmp_path / "base", 0, readme="---\nlicense: mit\n---\n", _name_or_path="org/base")
    llama(tmp_path / "two", 2, readme="---\nlicense: mit\n---\n", _name_or_path="models/base")
    front = front_matter(readme(merged(tmp_path).folder))
    assert front == {
        "base_model": ["org/base", "org/start"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergetool", "task_arithmetic"],
        "license": "mit",
    }


def test_a_licence_that_a_source_does_not_name_is_left_out(tmp_path):
    three(tmp_path, readme="---\nlicense: mit\n---\n")
    front = front_matter(readme(merged(tmp_path).folder))
    assert "license" not in front
    assert "base_model" not in front


def test_a_sentence_transformer_is_called_one(tmp_path):
    three(tmp_path)
    llama(tmp_path / "base", 0, files={"modules.json": b"[]", "1_Pooling/config.json": b"{}"})
    folder = merged(tmp_path).folder
    assert front_matter(readme(folder))["library_name"] == "sentence-transformers"
    assert (folder / "1_Pooling" / "config.json").read_bytes() == b"{}"


def test_the_body_of_the_card(tmp_path):
    keep = "  - where: {part: norm}\n    keep: one\n"
    text = readme(merged(three(tmp_path), RECIPE + DROP + keep + "# ``` ends nothing\n").folder)
    assert "[arXiv:2212.04089](https://arxiv.org/abs/2212.04089)" in text
    assert "Ilharco" in text
    assert "| `base` | base | local folder |" in text
    assert "| `one` | merged | local folder |" in text
    assert "19 tensors: 14 merged, 5 copied; 1 dropped" in text
    assert "mergetool run mergetool.yaml" in text
    assert "````yaml\nmerge_method" in text


def test_the_recipe_as_run_loads_and_means_the_same(tmp_path):
    done = merged(three(tmp_path))
    assert load(done.folder / "mergetool.yaml").canonical() == done.plan.recipe.canonical()


def absolute(home):
    """Sources, and a recipe that names them by absolute paths wherever a recipe can."""
    three(home)
    (home / "two" / "tokenizer.json").write_text("{}")
    text = RECIPE.replace("base_model: base", f"base_model: {home}/base  # once {home}/somewhere/else")
    text = text.replace("model: one", f"model: '{home}/one'").replace("model: two", f"model: {home}/two")
    return f"{text}tokenizer_source: {home}/two\nrules:\n  - where: {{part: norm}}\n    keep: {home}/one\n"


def test_no_path_of_this_machine_is_published(tmp_path):
    text = absolute(tmp_path)
    folder = merged(tmp_path, text).folder
    published = {name: content for name, content in contents(folder).items() if not name.startswith(".mergetool/")}
    assert [name for name, content in published.items() if os.fsencode(tmp_path) in content] == []
    assert [name for name, content in published.items() if tmp_path.name.encode() in content] == []
    kept = record(folder)
    assert [source["label"] for source in kept["sources"]] == ["base", "one", "two"]
    assert [source["weights"].keys() for source in kept["sources"]] == [{"model.safetensors"}] * 3
    assert (kept["recipe"]["base_model"], kept["recipe"]["rules"][0]["keep"]) == ("base", "one")
    assert "absolute ones are shortened" in readme(folder)


def test_what_only_this_machine_needs_is_kept_where_git_does_not_see_it(tmp_path):
    text = absolute(tmp_path)
    done = merged(tmp_path, text)
    local = read_local(done.folder)
    assert (local.text, local.recipe_folder) == (text, tmp_path.resolve())
    assert local.recipe == done.plan.recipe.canonical()
    assert (done.folder / ".mergetool" / ".gitignore").read_text() == "*\n"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": {}, "text": 1, "recipe_folder": null}'])
def test_a_private_record_that_makes_no_sense_counts_as_none(tmp_path, content):
    (tmp_path / ".mergetool").mkdir()
    assert read_local(tmp_path) is None
    (tmp_path / ".mergetool" / "local.json").write_text(content)
    assert read_local(tmp_path) is None


def test_the_private_record_of_a_source_does_not_come_along(tmp_path):
    first = merged(tmp_path, absolute(tmp_path), output="first").folder
    (tmp_path / "next").mkdir()
    text = f"merge_method: linear\nmodels:\n  - model: {first}\nparameters: {{weight: 1}}\n"
    second = merged(tmp_path / "next", text).folder
    assert read_local(second).text == text


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    three(tmp_path / "x")
    three(tmp_path / "y")
    text = "merge_method: linear\nmodels:\n  - model: x/one\n  - model: y/one\nparameters: {weight: 1}\n"
    kept = record(merged(tmp_path, text).folder)
    assert [source["label"] for source in kept["sources"]] == ["one", "one (2)"]
    assert [model["reference"] for model in kept["recipe"]["models"]] == ["one", "one (2)"]


def test_the_same_recipe_and_sources_give_the_same_bytes(tmp_path):
    three(tmp_path)
    first = contents(merged(tmp_path, output="here/a").folder)
    second = contents(merged(tmp_path, output="elsewhere/b").folder)
    assert first == second


def test_the_provenance_accounts_for_everything(tmp_path):
    done = merged(three(tmp_path), RECIPE + DROP)
    kept = record(done.folder)
    assert kept["tensors"] == dict(done.report.digests)
    assert kept["plan"] == done.plan.digest
    assert set(kept["files"]) == {"config.json", "README.md", "mergetool.yaml"}
    assert all(file_digest(done.folder / name) == digest for name, digest in kept["files"].items())
    (group,) = kept["methods"]
    assert group["method"] == "task_arithmetic"
    assert group["parameters"]["weight"] == [0.5, 0.3]
    assert len(group["tensors"]) == 19
    assert {"source": 0, "fate": "merged", "count": 19} in kept["routes"]
    dropped = [route for route in kept["routes"] if route["fate"] == "dropped"]
    assert [route["tensors"] for route in dropped] == [["model.layers.1.mlp.up_proj.weight"]] * 3
    (shard,) = done.plan.shards
    assert kept["shards"] == {shard.file: {"size": shard.nbytes, "header": header_digest(shard.header)}}
    weights = kept["sources"][1]["weights"]["model.safetensors"]
    assert weights["size"] == os.path.getsize(tmp_path / "one" / "model.safetensors")


@pytest.mark.parametrize("text", ["", "# title", "---\nnot: [closed\n---\n", "---\n- list\n---\n", "---\nx: 1\n"])
def test_a_card_without_front_matter_says_nothing(text):
    assert front_matter(text) == {}


def test_front_matter_ends_at_the_first_line_of_dashes():
    assert front_matter("---\r\na: 1\r\n---\r\nb\r\n---\r\n") == {"a": 1}
    assert yaml.safe_load("a: 1") == front_matter("---\na: 1\n---\n")


def test_a_model_of_the_hub_is_named_with_its_commit(tmp_path, monkeypatch):
    plan = merged(three(tmp_path)).plan
    commit = "0123456789abcdef0123456789abcdef01234567"
    one = replace(plan.sources[1], checkpoint=replace(plan.sources[1].checkpoint, repo="org/one", commit=commit))
    asked = []

    def small_file(repo, commit, name):
        asked.append((repo, commit, name))
        return b"---\nlicense: mit\nbase_model: org/older\n---\n"

    monkeypatch.setattr("mergetool.checkpoint.hub.small_file", small_file)
    text = card(replace(plan, sources=(plan.sources[0], one)), frozenset(), ["a\nnote"], Privacy((), ""))
    assert front_matter(text)["base_model"] == ["org/one"]
    assert f"| [org/one](https://huggingface.co/org/one) | merged | `{commit}` |" in text
    assert "## Notes\n\n- a note\n" in text
    assert asked == [("org/one", commit, "README.md")]
