"""The webhook: a JSON body on refusal, and no failure of it ever reaches the caller."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.tools.retrain.gate import Check, Decision
from tawin_nemo.tools.retrain.publish_root import PublishRoot
from tawin_nemo.tools.retrain.verb import conclude
from tawin_nemo.tools.retrain.webhook import check_webhook, post
from tawin_nemo.util.errors import ConfigError


@contextmanager
def receiver(status: int = 200, *, location: str = "") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server that answers with ``status``, and the bodies that it got."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook?secret=42", bodies
    finally:
        server.shutdown()
        server.server_close()


def test_a_refusal_is_posted_with_its_reasons(tmp_path):
    """With a decision that is refused by one check; a published one posts nothing."""
    root = PublishRoot(tmp_path)
    refused = Decision("2018-01-02", "2018-01-01", 0.05, 10, 0.0, (), (Check("coverage@10", 0.1, 0.5),))
    with receiver() as (url, bodies):
        recipe = load_recipe(None, [f"retrain.root={tmp_path}", f"retrain.webhook={url}", "name=shop"])
        result = conclude(recipe, root, refused)
    (body,) = bodies
    assert (body["event"], body["name"], body["date"], body["published"]) == ("refused", "shop", "2018-01-02", False)
    assert body["reasons"] == result["reasons"] == ["coverage@10: 0.1000, at least 0.5000 is asked for"]
    assert body["root"] == str(tmp_path)


@pytest.mark.parametrize("status", [400, 500, 302])
def test_an_answer_that_is_no_success_is_logged(status, caplog):
    with receiver(status, location="http://127.0.0.1:9/elsewhere") as (url, bodies):
        assert not post(url, {"a": 1}, seconds=10)
    assert bodies == [{"a": 1}]
    assert f"{status}" in caplog.text
    assert "secret" not in caplog.text


def test_nobody_there_and_nobody_who_answers_cost_no_more_than_the_limit(caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        begun = time.monotonic()
        assert not post(f"http://127.0.0.1:{port}/secret", {}, seconds=0.3)
        assert time.monotonic() - begun < 5
    assert not post(f"http://127.0.0.1:{port}/secret", {}, seconds=5)
    assert caplog.text.count("127.0.0.1 was not told") == 2
    assert "secret" not in caplog.text


def test_a_refusal_stays_a_refusal_when_nobody_can_be_told(tmp_path):
    refused = Decision("2018-01-02", "", 0.05, 10, 0.5, ())
    recipe = load_recipe(None, [f"retrain.root={tmp_path}", "retrain.webhook=http://127.0.0.1:9/x"])
    assert conclude(recipe, PublishRoot(tmp_path), refused)["published"] is False


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host/x", "http://", "javascript:alert(1)"])
def test_only_http_addresses_are_called(url):
    with pytest.raises(ConfigError, match=r"retrain.webhook=.* must be an http"):
        check_webhook(url)
    with pytest.raises(ConfigError):
        post(url, {}, seconds=1)


def test_addresses_that_are_right():
    check_webhook("")
    check_webhook("https://hooks.example.com/services/T0/B0?x=1")
