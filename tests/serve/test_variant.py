"""``serve.variant``: the server says which variant of an A/B test it is, in its metrics, replies and log."""

from __future__ import annotations

import json
import logging

import pytest

from tawin_nemo.serve.engine.telemetry import EVENT_LOGGER
from tests.serve.scene import serving


@pytest.mark.parametrize("variant", ["", "wide-beams"])
def test_replies_metrics_and_log_name_the_variant(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    events = logging.getLogger(EVENT_LOGGER)
    events.addHandler(caplog.handler)
    try:  # until the server has stopped: it writes a line after its reply
        with serving(variant=variant) as scene, scene.http() as http:
            good = http.post("/v1/recommendations", json={"history": [1]})
            wrong = http.post("/v1/recommendations", json={"history": ["nobody"]})
            assert scene.metric("tawin_server_info", variant=variant) == 1
    finally:
        events.removeHandler(caplog.handler)
    assert (good.status_code, wrong.status_code) == (200, 400)
    assert [reply.headers.get("X-Variant", "") for reply in (good, wrong)] == [variant, variant]
    lines = [json.loads(text) for text in caplog.messages if '"event": "request"' in text]
    assert {(line["status"], line.get("variant", "")) for line in lines} == {(200, variant), (400, variant)}
