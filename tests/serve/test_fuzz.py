"""Bodies that nobody meant: whatever comes in, what goes out is documented and never a fault of the server."""

from __future__ import annotations

import json
import math
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from tawin_nemo.api.schema import ERRORS
from tawin_nemo.serve.http import openapi
from tests.serve.scene import KEY, TOKEN, Scene

QUIET = settings(max_examples=20, suppress_health_check=list(HealthCheck))
DATA = schemathesis.openapi.from_path(openapi.FOLDER / "openapi.json")
CONTROL = schemathesis.openapi.from_path(openapi.FOLDER / "openapi_control.json")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = (
    *(
        "history",
        "history_titles",
        "prompt",
        "score_space",
        "weight_version",
        "timeout_s",
        "n",
        "beams",
        "allow",
        "filter",
    ),
    *("exclude_history", "deny", "min_score", "return_tokens", "items", "model", "best_of", "use_beam_search"),
    *("logprobs", "seed", "temperature", "max_tokens", "stream", "user"),
)
PATHS = ("/v1/recommendations", "/v1/completions", "/v1/score")


@DATA.parametrize()
@QUIET
def test_the_data_plane_keeps_to_its_document(scene: Scene, case: schemathesis.Case) -> None:
    answer = case.call(base_url=scene.data, headers={"Authorization": f"Bearer {KEY}"})
    checks = [response_schema_conformance]
    if answer.status_code == 504:  # what a body asks for that gives the server next to no time
        assert answer.json()["error"]["code"] == "deadline"
        assert case.body["timeout_s"] < 60
    else:
        checks.append(not_a_server_error)
    case.validate_response(answer, checks=checks)
    assert answer.status_code in {200, *ERRORS} - {500}


#: Draining ends the scene, and a group waits for whomever it is told to meet.
@CONTROL.exclude(path_regex="shutdown|drain|pause|init_weights").parametrize()
@QUIET
def test_the_control_plane_has_no_faults(scene: Scene, case: schemathesis.Case) -> None:
    answer = case.call(base_url=scene.control, headers={"Authorization": f"Bearer {TOKEN}"})
    case.validate_response(answer, checks=[not_a_server_error])
    assert answer.status_code < 500


@QUIET
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5))
def test_odd_json(scene: Scene, path: str, body: dict) -> None:
    with scene.http() as http:
        answer = http.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    assert_documented(answer)


@QUIET
@given(st.sampled_from(PATHS), st.binary(max_size=60))
def test_bytes_that_are_no_json(scene: Scene, path: str, body: bytes) -> None:
    with scene.http() as http:
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert_documented(answer)


@pytest.mark.parametrize(
    "body",
    [
        b'{"history": ["\xff\xfe"]}', b'{"prompt": "\\ud800"}', b'{"history": ["\\udfff"]}', b"[" * 5000,
        b'{"history": [1], "n": 1e3}', b'{"history": [1], "min_score": NaN}', b'{"history": [1], "n": true}',
        b'{"history": [1], "timeout_s": Infinity}', b'{"history": [1], "n": ' + b"9" * 5000 + b"}", b'{"history": {}}',
        b'{"history": [1], "min_score": "a"}', b'{"prompt": ""}', b"", b"null", b'{"history": [1.5]}',
    ],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
def test_known_troublemakers(scene: Scene, body: bytes) -> None:
    with scene.http() as http:
        answer = http.post("/v1/recommendations", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert_documented(answer)
        assert http.post("/v1/recommendations", json={"history": [1]}).status_code == 200


@pytest.mark.parametrize("path", ["/v1", "/v1/recommendations/../../etc/passwd", "/docs", "/%00", "/v1/models/x"])
def test_paths_that_are_not_there(scene: Scene, path: str) -> None:
    with scene.http() as http:
        answer = http.get(path)
        assert answer.status_code == 404
        assert_documented(answer)
        assert http.get("/v1/recommendations").status_code == 405


def assert_documented(answer: httpx.Response) -> None:
    """A reply with both versions and finite numbers, or an error in OpenAI's form."""
    assert answer.status_code < 500, answer.text
    body = json.loads(answer.content, parse_constant=lambda word: math.nan)
    if answer.status_code == 200:
        assert {"weight_version", "catalog_version"} <= body.keys()
        assert "nan" not in repr(body)
    else:
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert body["error"]["message"]


def test_documents_lie_in_the_package() -> None:
    assert {path.name for path in Path(openapi.FOLDER).glob("*.json")} == set(openapi.documents())
