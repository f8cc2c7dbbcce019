"""A small model hub on this machine, whose repositories can be made to fail the way real ones do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files of one model. cut: names whose download ends half way. hold: weights wait at it half way."""

    files: dict[str, bytes]
    cut: set[str] = field(default_factory=set)
    hold: threading.Event | None = None


@dataclass
class FakeHub:
    """repositories: by id. silent: ids whose questions are never answered. failing: ids answered with a status.

    fetched: the files whose content was asked for, as `owner/name/file`.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    failing: dict[str, int] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)


def read_folder(folder: Path) -> dict[str, bytes]:
    """A folder's files by their relative names."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.hub.asked.append(path)
        api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repo = f"{owner}/{name}"
        if repo in self.hub.silent:
            self.hub.stopping.wait(60)
            self.close_connection = True
        elif repo in self.hub.failing:
            self._answer(self.hub.failing[repo], b"{}")
        elif repo not in self.hub.repositories:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif api:
            self._describe(repo, self.hub.repositories[repo], rest)
        else:
            self._send_file(repo, self.hub.repositories[repo], "/".join(rest[2:]))

    def _describe(self, repo: str, repository: Repository, rest: list[str]) -> None:
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in repository.files.items()
            ]
            self._answer(200, json.dumps(tree).encode())
            return
        siblings = [{"rfilename": name} for name in repository.files]
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False}
        self._answer(200, json.dumps({**info, "tags": [], "downloads": 0, "likes": 0}).encode())

    def _send_file(self, repo: str, repository: Repository, name: str) -> None:
        data = repository.files.get(name)
        if data is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self._answer(200, data, headers)
            return
        self.hub.fetched.append(f"{repo}/{name}")
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._head(206 if first else 200, len(data) - first, headers)
        half = len(data) // 2
        if name in repository.cut:
            self.wfile.write(data[first:half])
            self.close_connection = True  # fewer bytes than announced
            return
        if repository.hold is not None and name == "model.safetensors":
            self.wfile.write(data[first:half])
            self.wfile.flush()
            repository.hold.wait(60)
            first = max(first, half)
        self.wfile.write(data[first:])

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is its own business."""


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens until the block ends."""
    hub = FakeHub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
