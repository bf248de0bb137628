"""Who may do what: keys, the control plane's token, origins, paths; and what is written down about it."""

from __future__ import annotations

import json
import logging
import re
import stat
from pathlib import Path

import httpx
import pytest

from tawin_nemo.api.secrets_files import control_token, read_keys
from tawin_nemo.serve.engine.telemetry import EVENT_LOGGER
from tawin_nemo.util.errors import ConfigError
from tests.serve.scene import IDS, KEY, TOKEN, Scene, serving

ONE = {"history": [1], "n": 1}
#: Every route of the control plane but /health.
CONTROL = [
    *(("POST", f"/{name}") for name in ("update_weights_from_disk", "pause_generation", "continue_generation")),
    *(
        ("POST", f"/{name}")
        for name in ("flush_cache", "drain", "shutdown", "rollback", "update_weights_from_distributed")
    ),
    *(("POST", f"/{name}_weights_update_group") for name in ("init", "destroy")),
    *(("POST", f"/catalog/{name}") for name in ("build", "validate", "activate", "items")),
    *(("GET", f"/{name}") for name in ("status", "metrics")),
]


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ä"]
)
def test_without_a_valid_key_nobody_is_served(scene: Scene, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    with httpx.Client(base_url=scene.data, headers=headers) as http:
        for answer in (http.post("/v1/recommendations", json=ONE), http.get("/v1/models"), http.get("/metrics")):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == http.get("/ready").status_code == 200


@pytest.mark.parametrize(("method", "path"), CONTROL)
def test_a_users_key_opens_nothing_of_the_control_plane(scene: Scene, method: str, path: str) -> None:
    for key in (KEY, "x", f"{TOKEN}x"):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.request(method, scene.control + path, headers=headers, json={} if method == "POST" else None)
        assert answer.status_code == 401
        other = httpx.request(method, scene.data + path, headers=headers, json={} if method == "POST" else None)
        assert other.status_code in (401, 404) or path == "/metrics"  # not on the data plane at all
    assert not scene.engine.closed


def test_the_list_of_control_routes_is_complete(scene: Scene) -> None:
    document = httpx.get(f"{scene.control}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    routes = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert routes == {*CONTROL, ("GET", "/health")}


def test_the_operators_token_is_no_users_key(scene: Scene) -> None:
    assert httpx.get(f"{scene.data}/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 401


def test_browsers_of_other_origins_are_let_in_only_where_named() -> None:
    asked = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    with serving() as scene:
        answer = httpx.options(f"{scene.data}/v1/recommendations", headers=asked)
        assert "access-control-allow-origin" not in answer.headers
    with serving(cors_origins=["https://shop.example"]) as scene:
        answer = httpx.options(f"{scene.data}/v1/recommendations", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        other = httpx.options(f"{scene.data}/v1/recommendations", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_paths_are_confined_to_the_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "weights").write_text("5")
    (inside / "link").symlink_to(outside / "weights")
    with serving(roots=[inside]) as scene:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        for name in (outside / "weights", inside / "link", inside / ".." / "outside" / "weights", "/etc/passwd"):
            for path, field in (("update_weights_from_disk", "model_path"), ("catalog/build", "path")):
                answer = httpx.post(f"{scene.control}/{path}", headers=headers, json={field: str(name)})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "path_not_allowed")
        missing = httpx.post(
            f"{scene.control}/update_weights_from_disk", headers=headers, json={"model_path": str(inside / "nothing")}
        )
        assert missing.status_code == 404
        assert scene.engine.weights == 1


def test_request_ids_are_kept_where_they_are_harmless_and_made_where_not(scene: Scene) -> None:
    with scene.http() as http:
        kept = http.post("/v1/recommendations", json=ONE, headers={"X-Request-Id": "shop-17.a_b"})
        made = http.post("/v1/recommendations", json=ONE, headers={"X-Request-Id": "a b\tc"})
    assert kept.headers["x-request-id"] == kept.json()["id"] == "shop-17.a_b"
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])


@pytest.mark.parametrize("name", ["x" * 65, "a b", "id;drop", "é"])
def test_an_unusable_request_id_is_replaced_without_a_word_in_the_log(
    scene: Scene, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with scene.http() as http:
        answer = http.post("/v1/recommendations", json=ONE, headers={"X-Request-Id": name.encode()})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.json()["id"] == answer.headers["x-request-id"]
    assert [record for record in caplog.records if record.name.startswith("asgi_correlation_id")] == []


def test_every_error_carries_the_request_id(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr("tawin_nemo.serve.http.data_plane.replies.score", broken)
    headers = {"X-Request-Id": "shop-18", "Authorization": f"Bearer {KEY}"}
    good, wrong = {"history": [1], "items": [2]}, {"history": [1], "items": []}
    for expected, path, body, extra in (
        (500, "/v1/score", good, {}),
        (400, "/v1/score", wrong, {}),
        (404, "/v1/nothing", {}, {}),
        (401, "/v1/score", good, {"Authorization": "Bearer wrong"}),
    ):
        answer = httpx.post(scene.data + path, json=body, headers={**headers, **extra})
        assert (answer.status_code, answer.headers.get_list("x-request-id")) == (expected, ["shop-18"])


@pytest.mark.parametrize("wanted", [False, True])
def test_the_log_is_structured_and_holds_histories_only_if_asked(
    wanted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    events = logging.getLogger(EVENT_LOGGER)
    events.addHandler(caplog.handler)
    try:  # until the server has stopped: it writes a line after its reply
        with serving(log_history=wanted) as scene, scene.http() as http:
            http.post("/v1/recommendations", json={"history": [IDS[17]]}, headers={"X-Request-Id": "one"})
            http.post("/v1/recommendations", json={"history": ["nobody"]}, headers={"X-Request-Id": "two"})
    finally:
        events.removeHandler(caplog.handler)
    lines = [json.loads(text) for text in caplog.messages if text.startswith("{")]
    requests = {line["id"]: line for line in lines if line["event"] == "request"}
    assert requests["one"].items() >= {
        "endpoint": "/v1/recommendations", "status": 200, "width": 10, "weight_version": 1, "catalog_version": 1,
    }.items()  # fmt: skip
    assert requests["two"].items() >= {"status": 400, "reason": "invalid"}.items()
    assert any(line["event"] == "history" for line in lines) == wanted
    assert (IDS[17] in "".join(caplog.messages)) == wanted
    assert KEY not in caplog.text


def test_keys_come_from_a_file_with_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# users\n\n{KEY}\nanother-key-0123456789\n")
    assert read_keys(str(file)) == [KEY, "another-key-0123456789"]
    assert read_keys("") == []
    for text, word in (("short\n", "shorter than 16"), ("\n", "no keys"), ("a key with some spaces\n", "spaces")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=word):
            read_keys(str(file))
    with pytest.raises(ConfigError, match=r"serve\.api_keys_file=.* cannot be read"):
        read_keys(str(tmp_path / "nothing"))


def test_the_token_is_made_for_this_user_only_and_is_no_key(tmp_path: Path) -> None:
    made = tmp_path / "serve" / "control_token"
    token = control_token("", made, [KEY])
    assert made.read_text().strip() == token
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert control_token("", made, [KEY]) != token
    given = tmp_path / "token"
    given.write_text(KEY)
    with pytest.raises(ConfigError, match="also a user's key"):
        control_token(str(given), made, [KEY])
    given.write_text(f"{TOKEN}\n{KEY}")
    with pytest.raises(ConfigError, match="holds 2 tokens"):
        control_token(str(given), made, [])
