"""Model folders made on the spot, and a Hub on 127.0.0.1 that serves them."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from mergetool.storage.dtypes import DTYPES
from mergetool.storage.writer import Writer, index, shard

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_SecretSecretSecretSecret"


def save(folder, tensors, limit=1 << 30, stem="model", config=True):
    """Write ``{name: shape}`` as F32 tensors counting up from 0; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = shard([(name, DTYPES["F32"], shape) for name, shape in tensors.items()], limit, stem)
    for part in parts:
        with Writer(folder / part.file, part) as writer:
            for entry in part.header.entries.values():
                writer.write(np.arange(entry.size, dtype=np.float32), entry.start)
    if len(parts) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index(parts)))
    if config:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@dataclass
class Hub:
    """What the server serves and what it was asked."""

    folder: Path
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    ranges: bool = True

    def asked(self, method, suffix):
        return [range_ for verb, path, range_ in self.requests if verb == method and path.endswith(suffix)]


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(self.path.split("?")[0])
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, b"", {})
            hub.requests.append((self.command, path, self.headers.get("Range")))
            for part, (status, code) in hub.status.items():
                if part in path:
                    return self.answer(status, b"", {"X-Error-Code": code})
            if re.fullmatch(r"/api/models/org/name(/revision/(main|v1|" + COMMIT + "))?", path):
                files = [p for p in hub.folder.rglob("*") if p.is_file()]
                siblings = [
                    {"rfilename": p.relative_to(hub.folder).as_posix(), "size": p.stat().st_size} for p in files
                ]
                body = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            if path.startswith("/api/models/org/name/revision/"):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            found = re.fullmatch(rf"/org/name/resolve/{COMMIT}/(.+)", path)
            if not found:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if not (hub.folder / found[1]).is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return self.serve((hub.folder / found[1]).read_bytes(), found[1])

        def serve(self, content, name):
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            headers = {"ETag": f'"{abs(hash(name)):x}"', "X-Repo-Commit": COMMIT}
            if wanted and hub.ranges:
                first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                return self.answer(206, content[first : last + 1], headers)
            return self.answer(200, content, headers)

        def answer(self, status, body, headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                try:
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client had read enough

    return Handler


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A Hub that serves ``org/name`` from a folder, with an empty cache and a token in the environment."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub(tmp_path / "served")
    hub.folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    # The library reads the environment once, when it is imported.
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    close_session()
    server.shutdown()
    thread.join()
    server.server_close()
