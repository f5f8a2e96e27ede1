import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from publish.models import RECIPE, merged, three

from mergetool.errors import CheckpointError
from mergetool.execute.measure import measure_model
from mergetool.execute.verify import verify
from mergetool.execute.verify_again import chosen
from mergetool.storage.digest import file_digest
from mergetool.storage.header import read_header

NAMES = ("headers", "index", "tensors", "files", "config", "sources")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three sources and their merge in several shards."""
    home = three(tmp_path_factory.mktemp("home"))
    merged(home, shard_size=1500)
    return home


@pytest.fixture
def folder(home, tmp_path):
    """A copy of the merge, beside it, to do harm to."""
    return shutil.copytree(home / "merged", home / tmp_path.name)


def failed(folder, **options):
    found = verify(folder, **options)
    assert tuple(check.name for check in found.checks) == NAMES
    assert found.ok == all(check.ok for check in found.checks)
    return {check.name: check.detail for check in found.checks if not check.ok}


def checks(folder, **options):
    return {check.name: check for check in verify(folder, **options).checks}


def rewrite(folder, name, change):
    """Change a JSON file and the digest on record with it, as one would who meant it."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    record = json.loads((folder / "provenance.json").read_text())
    record["files"][name] = file_digest(folder / name)
    (folder / "provenance.json").write_text(json.dumps(record))


def test_a_merge_as_it_was_made_has_nothing_wrong(folder):
    found = verify(folder)
    assert found.ok
    assert not any(check.skipped for check in found.checks)
    assert "8 of 20 tensors" in found.checks[-1].detail


def test_a_folder_that_was_moved_finds_its_sources(home, tmp_path):
    moved = shutil.copytree(home / "merged", tmp_path / "far" / "away")
    assert "8 of 20 tensors" in checks(moved)["sources"].detail


def test_a_folder_as_published_finds_its_sources_when_told_where(home, folder):
    shutil.rmtree(folder / ".mergetool")
    assert checks(folder)["sources"].detail.startswith("skipped: nothing here says where")
    found = verify(folder, recipe_folder=home)
    assert found.ok
    assert "8 of 20 tensors" in found.checks[-1].detail


def test_sources_named_by_absolute_paths_are_found_by_the_private_record_alone(tmp_path):
    text = RECIPE.replace("model: one", f"model: {three(tmp_path)}/one")
    folder = merged(tmp_path, text).folder
    assert "8 of 20 tensors" in checks(folder)["sources"].detail
    shutil.rmtree(folder / ".mergetool")
    assert "8 of 20 tensors" in checks(folder, recipe_folder=tmp_path)["sources"].detail
    assert "the plan cannot be built again" in checks(folder, recipe_folder=folder)["sources"].detail


def test_no_sample_is_no_finding(folder):
    assert checks(folder, sample=0)["sources"].detail == "skipped: no tensor is to be made again"


def test_a_single_file_needs_no_index(tmp_path):
    assert not failed(merged(three(tmp_path)).folder)


def test_a_flipped_byte_is_found(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    first = next(iter(read_header(path).entries.values()))
    content = bytearray(path.read_bytes())
    content[first.start + 5] ^= 4
    path.write_bytes(content)
    wrong = failed(folder)
    assert set(wrong) == {"tensors", "sources"}
    assert wrong["tensors"] == f"`{first.name}` differs"


def test_an_edited_config_is_found(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"max_position_embeddings": 32', '"max_position_embeddings": 64'))
    assert failed(folder) == {"files": "config.json was changed"}


def test_a_changed_or_missing_card_is_found(folder):
    (folder / "README.md").write_text("mine now")
    assert failed(folder) == {"files": "README.md was changed"}
    (folder / "README.md").unlink()
    assert failed(folder) == {"files": "README.md is missing"}


def test_a_missing_shard_is_found(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    wrong = failed(folder)
    assert path.name in wrong["headers"]
    assert set(wrong) == {"headers", "index", "tensors", "config"}
    assert "is missing" in wrong["tensors"]


def test_a_truncated_shard_is_found(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert "headers" in failed(folder)


def test_weights_that_do_not_belong_are_found(folder):
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "model.safetensors")
    assert failed(folder) == {"headers": "model.safetensors does not belong here"}


@pytest.mark.parametrize(("old", "new"), [(b'"dtype":"F32"', b'"dtype":"I32"'), (b'"pt"', b'"tf"')])
def test_a_header_that_says_otherwise_is_found(folder, old, new):
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    assert failed(folder, sample=0)["headers"] == f"the header of {path.name} was changed"


def test_a_tensor_made_again_must_have_its_dtype_and_shape_too(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    first = next(iter(read_header(path).entries.values()))
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    shape = list(first.shape)
    assert f"`{first.name}` is I32 {shape} and comes out as F32 {shape}" in failed(folder, sample=20)["sources"]


@pytest.mark.parametrize("name", ["modeling_x.py", "sub/tokenizer.json", "sub/model.safetensors", "__init__.py"])
def test_files_that_are_not_on_record_are_found(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    assert failed(folder) == {"files": f"{name} does not belong here"}


def test_a_link_that_is_not_on_record_is_found(folder, tmp_path):
    (folder / "code").symlink_to(tmp_path)
    (folder / "gone.py").symlink_to(tmp_path / "nowhere")
    assert failed(folder) == {"files": "code does not belong here; gone.py does not belong here"}


@pytest.mark.parametrize("name", [".journal.jsonl", ".lock", ".gitattributes", ".git/config", ".cache/huggingface/x"])
def test_hidden_files_are_no_part_of_the_model(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    assert not failed(folder)


def test_an_index_that_points_elsewhere_is_found(folder):
    def swap(content):
        content["weight_map"]["model.norm.weight"] = "model-00001-of-00001.safetensors"

    rewrite(folder, "model.safetensors.index.json", swap)
    assert failed(folder) == {"index": "`model.norm.weight`"}


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [], "metadata": {"total_size": 1}}', "nonsense"])
def test_an_index_that_makes_no_sense_is_found(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    assert set(failed(folder)) == {"index", "files"}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("intermediate_size", 16, "the config says [8, 16]"),
        ("num_hidden_layers", 3, "`model.layers.2.input_layernorm.weight` is missing"),
        ("num_hidden_layers", 1, "has no place in the model"),
        ("tie_word_embeddings", False, "`lm_head.weight` is missing"),
        ("hidden_size", "wide", "cannot be made from the config"),
    ],
)
def test_a_config_that_disagrees_with_the_shapes_is_found(folder, key, value, said):
    rewrite(folder, "config.json", lambda config: config.update({key: value}))
    wrong = failed(folder)
    assert set(wrong) == {"config"}
    assert said in wrong["config"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["NobodysForCausalLM"]}, "no architecture NobodysForCausalLM"),
        ({"architectures": None}, "no architecture None"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
    ],
)
def test_a_model_that_transformers_does_not_know_is_skipped(folder, change, why):
    rewrite(folder, "config.json", lambda config: config.update(change))
    found = checks(folder)["config"]
    assert found.ok
    assert found.skipped
    assert why in found.detail


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_config_that_is_no_json_object_is_found(folder, content):
    (folder / "config.json").write_text(content)
    assert set(failed(folder)) == {"files", "config"}


def test_sources_that_are_gone_are_said_to_be(tmp_path):
    folder = merged(three(tmp_path)).folder
    shutil.rmtree(tmp_path / "one")
    found = checks(folder)["sources"]
    assert found.ok
    assert found.skipped
    assert "one" in found.detail


def test_other_sources_under_the_same_names_are_said_to_be(tmp_path):
    folder = merged(three(tmp_path)).folder
    path = tmp_path / "two" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tf"'))
    found = checks(folder)["sources"]
    assert found.skipped
    assert "two" in found.detail


def test_weights_of_a_source_that_changed_are_found(tmp_path):
    folder = merged(three(tmp_path)).folder
    path = tmp_path / "two" / "model.safetensors"
    content = np.fromfile(path, np.uint8)
    start = read_header(path).entries["model.embed_tokens.weight"].start
    content[start + 2] ^= 0x40
    content.tofile(path)
    assert failed(folder, sample=20) == {"sources": "`model.embed_tokens.weight` comes out otherwise"}


def test_measures_of_the_whole_model_are_made_again_too(tmp_path, monkeypatch):
    text = RECIPE.replace("task_arithmetic", "ties") + "parameters: {density: 0.4, scope: model}\n"
    folder = merged(three(tmp_path), text).folder
    measuring = []

    def counted(*args):
        measuring.append(len(args[0].jobs))
        return measure_model(*args)

    monkeypatch.setattr("mergetool.execute.merged.measure_model", counted)
    assert checks(folder)["sources"].detail == "8 of 20 tensors made again, the same bytes"
    assert len(measuring) == 1, "what is known of the whole model is measured once for all"


def test_nothing_is_downloaded_to_make_a_tensor_again(tmp_path, monkeypatch):
    done = merged(three(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    remote = replace(done.plan.sources[1].checkpoint, repo="org/one", commit=commit, path=None)
    sources = (done.plan.sources[0], replace(done.plan.sources[1], checkpoint=remote), done.plan.sources[2])
    monkeypatch.setattr("mergetool.execute.verify_again.build", lambda recipe: replace(done.plan, sources=sources))
    monkeypatch.setattr("mergetool.checkpoint.hub.cached_file", lambda repo, commit, name: None)
    assert checks(done.folder)["sources"].detail == "skipped: not the sources that it was made from: one"
    path = done.folder / "provenance.json"
    path.write_text(
        path.read_text().replace(
            '"label": "one",\n   "repo": null,\n   "commit": null',
            f'''"label": "one",
   "repo": "org/one", "commit": "{commit}"''',
        )
    )
    assert checks(done.folder)["sources"].detail == "skipped: one is not in the local cache"


def test_a_folder_that_is_not_ours_is_refused(home, folder):
    with pytest.raises(CheckpointError, match=r"has no provenance\.json"):
        verify(home / "base")
    shards = {"model.safetensors": 12}
    for record in ({}, {"tensors": {}, "files": {}, "sources": [], "shards": shards}):
        (folder / "provenance.json").write_text(json.dumps({"format": 2, **record}))
        with pytest.raises(CheckpointError, match="is incomplete"):
            verify(folder)
    (folder / "provenance.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="not of format 2"):
        verify(folder)


def test_the_sample_has_the_first_the_largest_and_others_of_all_sizes(tmp_path):
    jobs = merged(three(tmp_path)).plan.jobs
    picked = chosen(jobs, 4)
    assert picked == chosen(jobs, 4)
    assert picked[0] is jobs[0]
    assert max(jobs, key=lambda job: job.size).name in [job.name for job in picked]
    assert len({job.name for job in picked}) == len(picked) <= 4
    assert len(chosen(jobs, 100)) == len(jobs)
    assert chosen(jobs, 0) == [] == chosen((), 4)
