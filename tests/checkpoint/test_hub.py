"""Models on the Hub, against a server on 127.0.0.1: what is asked, what is fetched, what is told."""

from __future__ import annotations

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from mergetool.checkpoint import hub as hub_module
from mergetool.checkpoint import sources
from mergetool.checkpoint.checkpoint import fetch, open_checkpoint
from mergetool.errors import CheckpointError, HeaderError
from mergetool.storage.reader import Reader

from .conftest import COMMIT, TOKEN, save

TENSORS = {"a": (100,), "b": (100,), "c": ()}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def serve(served):
    save(served.folder, TENSORS, 410)
    (served.folder / "tokenizer.json").write_text("{}")
    (served.folder / "README.md").write_text("x")


def test_opening_reads_headers_and_fetching_reads_only_what_is_asked(served):
    serve(served)
    found = open_checkpoint("org/name@v1")
    assert (found.label, found.repo, found.commit, found.is_remote) == ("org/name@v1", "org/name", COMMIT, True)
    assert {name: t.shape for name, t in found.tensors.items()} == TENSORS
    assert found.files == ("config.json", "tokenizer.json")
    assert served.asked("GET", SECOND) == [f"bytes=0-{(served.folder / SECOND).stat().st_size - 1}"]
    with pytest.raises(CheckpointError, match="not been fetched"):
        found.file(FIRST)
    assert found.companion("tokenizer.json") == b"{}"
    assert fetch(found, []) is found
    here = fetch(found, [FIRST])
    assert not here.is_remote
    assert not here.file(SECOND).exists()
    tensor = here.tensors["a"]
    with Reader(here.file(FIRST), here.headers[FIRST]) as reader:
        assert reader.read(here.headers[FIRST].entries["a"])[tensor.size - 1] == 99
    served.requests.clear()
    assert open_checkpoint("org/name@v1").tensors == found.tensors
    assert served.asked("GET", FIRST) == []  # cached now
    assert len(served.asked("GET", SECOND)) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_header_longer_than_the_first_bytes_takes_a_second_request(served, monkeypatch, ranges):
    serve(served)
    served.ranges = ranges
    monkeypatch.setattr(sources, "_FIRST_BYTES", 16)
    assert {name: t.shape for name, t in open_checkpoint("org/name").tensors.items()} == TENSORS
    assert len(served.asked("GET", FIRST)) == 2
    assert served.asked("GET", FIRST)[1].startswith("bytes=16-")


def test_a_damaged_file_is_found_from_its_first_bytes(served):
    serve(served)
    (served.folder / SECOND).write_bytes((served.folder / SECOND).read_bytes()[:-1])
    with pytest.raises(HeaderError, match=f"org/name: {SECOND}: is truncated"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    ("part", "status", "code", "message"),
    [
        ("/api/models", 401, "RepoNotFound", "neither a folder here nor a repo"),
        ("/api/models", 403, "GatedRepo", "gated"),
        ("/api/models", 418, "", "HTTP status 418"),
        ("/api/models", 503, "", "HTTP status 503"),
        (FIRST, 403, "", "HTTP status 403"),
        ("config.json", 404, "EntryNotFound", "no such file"),
    ],
)
def test_each_answer_of_the_hub_gets_its_message_without_the_token(served, part, status, code, message):
    serve(served)
    served.status[part] = (status, code)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint("org/name")
    assert TOKEN not in str(caught.value)


def test_an_unknown_revision_and_an_unlisted_shard_are_told(served):
    serve(served)
    with pytest.raises(CheckpointError, match="org/name@v2: the repo has no such revision"):
        open_checkpoint("org/name@v2")
    (served.folder / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST}: is not in the repo"):
        open_checkpoint("org/name")


@pytest.fixture(params=["offline", "no network"])
def unplug(request, monkeypatch):
    def pull():
        close_session()
        if request.param == "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        else:
            monkeypatch.setattr(constants, "ENDPOINT", "http://user:pass@127.0.0.1:9")

    return pull


def test_without_network_the_cache_is_used(served, unplug):
    serve(served)
    online = open_checkpoint(f"org/name@{COMMIT}")
    fetched = fetch(online, [FIRST, SECOND, "tokenizer.json"])
    unplug()
    found = open_checkpoint(f"org/name@{COMMIT}")
    assert (found.commit, found.path, found.tensors) == (COMMIT, fetched.path, online.tensors)
    assert found.companion("tokenizer.json") == b"{}"
    found.file(FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST}: is not in the cache, and the Hub cannot be reached"):
        open_checkpoint(f"org/name@{COMMIT}")


def test_without_network_and_cache_the_reason_is_told(served, unplug):
    unplug()
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set|127\.0\.0\.1\) cannot be reached") as caught:
        open_checkpoint("org/name")
    assert "pass" not in str(caught.value)


def test_a_full_disk_is_told_as_such():
    error = OSError(28, "No space left on device", "/cache/x")
    assert "cannot be stored in the cache: No space left" in str(hub_module.failure(error, "org/name", None))
