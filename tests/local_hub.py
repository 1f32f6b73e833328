"""A model hub on this machine, speaking as much of the hub's file protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """Serves folders as repositories of one commit, known as that commit and as ``main``.

    Weight files are announced as LFS files, under their SHA-256 (or under ``announced`` instead).
    """

    url: str
    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    announced: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def etag(self, path: Path) -> str:
        content = path.read_bytes()
        if path.suffix in (".safetensors", ".bin"):
            return self.announced.get(path.name, hashlib.sha256(content).hexdigest())
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _send(self, status: int, content: bytes, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in self.hub.gated:
            if not api or rest[:1] == ["tree"]:
                return self._error(401, "GatedRepo")
            return self._error(401, "GatedRepo")
        if name not in self.hub.repositories:
            return self._error(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._error(404, "RevisionNotFound")
        folder = self.hub.repositories[name]
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if api and rest[:1] == ["tree"]:
            tree = [self._entry(p) for p in files]
            return self._send(200, json.dumps(tree).encode(), Content_Type="application/json")
        if api:
            info = {
                "id": name,
                "_id": "0",
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": p.name} for p in files],
            }
            return self._send(200, json.dumps(info).encode(), Content_Type="application/json")
        file = folder / rest[2]
        if not file.is_file():
            return self._error(404, "EntryNotFound")
        headers = {"ETag": f'"{self.hub.etag(file)}"', "X_Repo_Commit": COMMIT}
        return self._send(200, file.read_bytes(), body, **headers)

    def _entry(self, path: Path) -> dict[str, Any]:
        etag, size = self.hub.etag(path), path.stat().st_size
        entry = {"type": "file", "path": path.name, "size": size, "oid": etag[:40]}
        if len(etag) == 64:
            entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 130}
        return entry


@contextmanager
def serve() -> Iterator[LocalHub]:
    """Run a hub until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass.hub = hub
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
