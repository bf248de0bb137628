"""Requests of different clients share model calls, and each gets what it gets alone, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.serve.scene import MODEL, TITLES, Scene, draws_of, first_catalog, serving


def asked(rng: np.random.Generator) -> dict:
    """A request with its own width, space and filter."""
    return {
        "history": draws_of(rng), "n": int(rng.integers(1, 5)), "beams": int(rng.integers(5, 20)),
        "deny": rng.choice(len(TITLES), rng.integers(0, 10), replace=False).tolist(),
        "score_space": str(rng.choice(["trie", "trie", "vocab"])), "return_tokens": True,
    }  # fmt: skip


def together(scene: Scene, requests: list[dict], *, closed: bool = True) -> list[dict]:
    """All requests at once: the gate opens when all but the first wait in the queue (``closed``)."""

    http = scene.http()

    def post(body: dict) -> dict:
        answer = http.post("/v1/recommendations", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    if closed:
        scene.gate.clear()
    with http, ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(post, body) for body in requests]
        if closed:
            scene.wait_until(lambda: scene.engine.busy == len(requests))
            scene.gate.set()
        return [future.result(60) for future in futures]


def test_requests_share_branch_steps_and_get_what_they_get_alone() -> None:
    requests = [asked(np.random.default_rng(seed)) for seed in range(16)]
    with serving() as scene:
        alone = [together(scene, [body], closed=False)[0] for body in requests]
        steps = scene.metric("tawin_requests_per_branch_step_count")
        shared = scene.metric("tawin_requests_per_branch_step_sum")
        assert shared == steps  # one at a time until here
        joint = together(scene, requests)
        steps = scene.metric("tawin_requests_per_branch_step_count") - steps
        shared = scene.metric("tawin_requests_per_branch_step_sum") - shared
    assert [reply["items"] for reply in joint] == [reply["items"] for reply in alone]
    assert shared / steps > 3  # two lanes (score spaces) of several requests each
    assert all(reply["items"] for reply in joint)


def test_a_request_joins_others_that_are_running() -> None:
    """The second request is admitted between two model calls of the first, not behind its end."""
    with serving(join_after=0) as scene, ThreadPoolExecutor(2) as pool:
        scene.gate.clear()

        def post(item: int) -> dict:
            with scene.http() as http:
                return http.post("/v1/recommendations", json={"history": [item], "score_space": "vocab"}).json()

        first = pool.submit(post, 1)
        scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        second = pool.submit(post, 2)
        scene.wait_until(lambda: scene.engine.busy == 2)
        scene.gate.set()
        assert first.result(30)["items"]
        assert second.result(30)["items"]
        text = scene.engine.metrics.text().decode()
        assert scene.metric("tawin_requests_per_branch_step_sum") > scene.metric(
            "tawin_requests_per_branch_step_count"
        ), text


@pytest.mark.parametrize("limit", [{"row_budget": 14}, {"token_budget": 60}], ids=str)
def test_the_budgets_bound_what_runs_at_once_and_a_request_above_them_runs_alone(limit: dict) -> None:
    requests = [{"history": [item], "n": 1, "beams": 6} for item in range(6)] + [{"history": [7], "beams": 20}]
    seen: list[tuple[int, int, int]] = []
    with serving(**limit) as scene:
        running = scene.engine._running
        advance = running.advance

        def watched() -> None:
            seen.append((len(running.jobs), running.rows, scene.engine.leader.replica.held()))
            advance()

        running.advance = watched  # type: ignore[method-assign]
        replies = together(scene, requests)
        free = [together(scene, [body], closed=False)[0] for body in requests]
    assert [reply["items"] for reply in replies] == [reply["items"] for reply in free]
    for jobs, rows, tokens in seen:
        assert jobs <= 1 or (rows <= limit.get("row_budget", 10**9) and tokens <= limit.get("token_budget", 10**9))
    assert max(rows for _, rows, _ in seen) >= 20  # the wide one ran
    assert max(jobs for jobs, _, _ in seen) >= 2


def test_draws_and_searches_run_beside_each_other() -> None:
    prompt = first_catalog().prompt_format.template.prompt([TITLES[4]])
    with serving() as scene, scene.client() as client:
        alone = [choice.text for choice in client.complete(prompt, model=MODEL, n=5, seed=3).choices]
        scene.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            search = pool.submit(client.recommend, [4])
            scene.wait_until(lambda: scene.engine.busy == 1)
            draws = pool.submit(client.complete, prompt, model=MODEL, n=5, seed=3)
            scene.wait_until(lambda: scene.engine.busy == 2)
            scene.gate.set()
            assert [choice.text for choice in draws.result(30).choices] == alone
            assert search.result(30).items


def test_a_search_that_fails_takes_only_its_own_requests_with_it() -> None:
    with serving() as scene, scene.http() as http:
        scene.weights[0].broken = True
        answer = http.post("/v1/recommendations", json={"history": [1]})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "RuntimeError" in answer.json()["error"]["message"]
        drawn = http.post("/v1/completions", json={"model": MODEL, "prompt": "x"})
        assert drawn.status_code == 500
        scene.weights[0].broken = False
        assert http.post("/v1/recommendations", json={"history": [1]}).status_code == 200
        assert scene.metric("tawin_rejections_total", reason="fault") == 2
        assert scene.engine.busy == 0
