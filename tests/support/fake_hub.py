"""A small Hugging Face Hub on loopback: what its client asks to list and download models, with a file server beside it.

Files of weights are stored apart, as on the Hub: their address answers with a redirect to another host, which knows
ranges and no tokens. Every request is recorded.
"""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Received:
    """A request: its method, its path, and two of its headers."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class FakeHub:
    """The repositories, by name, and how they are served.

    refused: answers to every request for a repository, as (status, the Hub's error code); damaged: hashes of blobs
    that arrive with their first byte changed; ranges: whether the file server knows them; cut: hashes of blobs whose
    first answer breaks off half way.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    ranges: bool = True
    received: list[Received] = field(default_factory=list)
    url: str = ""
    files_url: str = ""

    def add(self, name: str, files: dict[str, bytes] | Path) -> None:
        """Serve a repository with these files, or those of a folder."""
        if isinstance(files, Path):
            folder = files
            files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repositories[name] = files

    def commit(self, name: str) -> str:
        """The commit that `main` points to."""
        return self.commits.get(name, COMMIT)

    def downloaded(self) -> list[str]:
        """The files of which contents were asked for, in the order of the repositories' addresses."""
        blobs = {sha256(data): path for files in self.repositories.values() for path, data in files.items()}
        paths = []
        for request in self.received:
            if request.method == "GET" and request.path.startswith("/blobs/"):
                paths.append(blobs[request.path.removeprefix("/blobs/")])
            elif request.method == "GET" and "/resolve/" in request.path and not is_large(request.path):
                paths.append(request.path.split("/resolve/")[1].split("/", 1)[1])
        return paths


def sha256(data: bytes) -> str:
    """The hash by which large files are stored."""
    return hashlib.sha256(data).hexdigest()


def is_large(path: str) -> bool:
    """Whether the Hub stores a file apart."""
    return path.endswith((".safetensors", ".bin", ".pth"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.received.append(
            Received(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if path.startswith("/blobs/"):
            return self._blob(path.removeprefix("/blobs/"))
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolved = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = listed or resolved
        if found is None:
            return self._send(404, b"")
        name = found[1]
        revision = (listed[3] if listed else found[2]) or "main"
        if name in self.hub.refused:
            status, code = self.hub.refused[name]
            return self._send(status, b"{}", {"X-Error-Code": code})
        if name not in self.hub.repositories:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", self.hub.commit(name)):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if listed:
            return self._json(self._tree(name) if listed[2] == "tree" else self._info(name))
        return self._file(name, found[3])

    def _info(self, name: str) -> dict[str, Any]:
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest(), **self._lfs(path, data)}
            for path, data in self.hub.repositories[name].items()
        ]
        return {"id": name, "modelId": name, "sha": self.hub.commit(name), "siblings": siblings, "tags": []}

    def _lfs(self, path: str, data: bytes) -> dict[str, Any]:
        if not is_large(path):
            return {}
        return {"lfs": {"sha256": sha256(data), "oid": sha256(data), "size": len(data), "pointerSize": 134}}

    def _tree(self, name: str) -> list[dict[str, Any]]:
        return [
            {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
                **self._lfs(path, data),
            }
            for path, data in self.hub.repositories[name].items()
        ]

    def _file(self, name: str, path: str) -> None:
        commit = {"X-Repo-Commit": self.hub.commit(name)}
        data = self.hub.repositories[name].get(path)
        if data is None:
            return self._send(404, b"", {**commit, "X-Error-Code": "EntryNotFound"})
        if not is_large(path):
            return self._send(200, data, {**commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**commit, **linked, "Location": f"{self.hub.files_url}/blobs/{sha256(data)}"})

    def _blob(self, digest: str) -> None:
        contents = [data for files in self.hub.repositories.values() for data in files.values()]
        data = next(data for data in contents if sha256(data) == digest)
        if digest in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None or not self.hub.ranges:
            return self._send(200, data, cut=digest in self.hub.cut and not self.hub.cut.discard(digest))
        start = int(wanted[1])
        self._send(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent about clients that were interrupted: they reset the connection or read no further."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def served(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve the hub, and the files under another name of this machine, until the block ends."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.files_url = f"http://localhost:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub's client of this process talk to `hub` and keep what it downloads in `cache`."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """The variables that let another process talk to `hub`."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
