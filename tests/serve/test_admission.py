"""Waiting requests join those that run together, and none waits long for it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tawin_nemo.config.schema import ServeConfig
from tawin_nemo.serve.engine import jobs
from tawin_nemo.serve.engine.jobs import AdmissionPolicy, Limits
from tests.serve.scene import Scene, serving

LIMITS = Limits(queue=8, tokens=1000, rows=100, join_after=2, gather_s=0.5)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    return now


def test_a_single_client_never_waits(clock: list[float]) -> None:
    policy = AdmissionPolicy(LIMITS)
    for _ in range(3):
        assert policy.admits(waiting=1, running=0)
        policy.record_call(ran=1, left=0, waiting=0)
        assert policy.wait_s(1) == 0


def test_an_idle_engine_waits_for_as_many_as_were_there_and_no_longer_than_told(clock: list[float]) -> None:
    policy = AdmissionPolicy(LIMITS)
    policy.record_call(ran=3, left=3, waiting=1)  # four at once
    policy.record_call(ran=3, left=0, waiting=0)
    assert not policy.admits(waiting=3, running=0)
    assert policy.wait_s(3) == 0.5
    assert policy.admits(waiting=4, running=0)
    clock[0] += 0.25
    assert policy.wait_s(1) == 0.25
    clock[0] += 0.25
    assert policy.admits(waiting=1, running=0)
    policy.record_call(ran=1, left=0, waiting=0)  # now it is a group of one
    assert policy.admits(waiting=1, running=0)


def test_turns_in_which_nothing_ran_say_nothing_about_the_group(clock: list[float]) -> None:
    policy = AdmissionPolicy(LIMITS)
    policy.record_call(ran=4, left=0, waiting=0)
    clock[0] += 0.1
    policy.record_call(ran=0, left=0, waiting=0)  # a probe
    assert policy.wait_s(1) == pytest.approx(0.4)


def test_those_that_wait_join_when_they_are_more_or_after_so_many_calls(clock: list[float]) -> None:
    policy = AdmissionPolicy(LIMITS)
    assert policy.admits(waiting=3, running=2)
    assert not policy.admits(waiting=2, running=2)
    assert not policy.admits(waiting=2, running=2)
    assert policy.admits(waiting=2, running=2)
    assert not policy.admits(waiting=1, running=4)  # the next one counts its own calls
    assert not policy.admits(waiting=0, running=4)


def test_without_any_wait_whoever_comes_joins_at_once(clock: list[float]) -> None:
    policy = AdmissionPolicy(replace(LIMITS, join_after=0, gather_s=0.0))
    policy.record_call(ran=8, left=0, waiting=0)
    assert policy.admits(waiting=1, running=0)
    assert policy.admits(waiting=1, running=8)


def test_the_limits_are_those_of_the_recipe() -> None:
    asked = ServeConfig(max_queue=3, token_budget=17, row_budget=5, join_after=7, gather_ms=20.0)
    assert Limits.of(asked) == Limits(queue=3, tokens=17, rows=5, join_after=7, gather_s=0.02)


@pytest.mark.parametrize(("join_after", "together_in_second"), [(0, 2), (1, 1)])
def test_a_request_that_comes_late_joins_after_so_many_calls(join_after: int, together_in_second: int) -> None:
    ran = []
    with serving(join_after=join_after) as scene, scene.http() as http, ThreadPoolExecutor(2) as pool:
        advance = scene.engine._running.advance

        def watched() -> None:
            ran.append(len(scene.engine._running.jobs))
            advance()

        scene.engine._running.advance = watched  # type: ignore[method-assign]
        scene.gate.clear()
        body = {"score_space": "vocab"}  # has two calls at least
        first = pool.submit(http.post, "/v1/recommendations", json={"history": [1], **body})
        scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        late = pool.submit(http.post, "/v1/recommendations", json={"history": [2], **body})
        scene.wait_until(lambda: scene.engine.busy == 2)
        scene.gate.set()
        assert first.result(30).status_code == late.result(30).status_code == 200
    assert ran[:2] == [1, together_in_second]


def test_an_idle_server_holds_the_first_of_a_group_until_the_others_are_there() -> None:
    def one(scene: Scene, item: int) -> None:
        with scene.http() as http:
            assert http.post("/v1/recommendations", json={"history": [item]}).status_code == 200

    with serving() as scene, ThreadPoolExecutor(3) as pool:
        policy = AdmissionPolicy(replace(scene.engine.limits, gather_s=60.0))
        policy.record_call(ran=3, left=0, waiting=0)
        scene.engine._admission = policy
        first = pool.submit(one, scene, 4)
        scene.wait_until(lambda: len(scene.engine._queue) == 1)
        time.sleep(0.3)
        assert len(scene.engine._queue) == 1  # nothing runs, and yet it waits
        rest = [pool.submit(one, scene, item) for item in (5, 6)]
        for future in (first, *rest):
            future.result(30)
