"""A Hugging Face hub on this machine: the three routes that ``snapshot_download`` asks for, over a folder of models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    root: ClassVar[Path]
    asked: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", with_body=with_body)
            return
        file = self.root / parts[0] / parts[1] / "/".join(parts[4:])
        if parts[2] != "resolve" or not file.is_file():
            self._fail("EntryNotFound")
            return
        body = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._send(200, body if with_body else b"", {**headers, "Content-Length": str(len(body))})

    def _describe(self, name: str, revision: str, *, with_body: bool) -> None:
        folder = self.root / name
        if not folder.is_dir():
            self._fail("RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._fail("RevisionNotFound")
        else:
            files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            body = json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode()
            self._send(200, body if with_body else b"", {"Content-Length": str(len(body))})

    def _fail(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "Content-Length": "0"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def fake_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the models OWNER/NAME below ``root``; gives the address for HF_ENDPOINT and the paths that were asked."""
    handler = type("Handler", (_Handler,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    finally:
        server.shutdown()
        thread.join()
