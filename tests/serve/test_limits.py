"""Overload, deadlines, clients that leave, slow and large bodies, pauses: honest replies, and no work for nobody."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tawin_nemo.api.client import ServerError
from tests.serve.scene import KEY, Scene, serving

ONE = {"history": [1], "n": 1}


def raw(scene: Scene, *, body: bytes = b'{"history": [1]}', length: int | None = None) -> socket.socket:
    """A connection on which a request was begun by hand."""
    host, port = scene.data.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST /v1/recommendations HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_full_queue_answers_429_at_once_and_takes_requests_again_later() -> None:
    with serving(max_queue=2, row_budget=1) as scene, ThreadPoolExecutor(3) as pool, scene.client() as client:
        scene.gate.clear()
        running = pool.submit(client.recommend, [1], n=1)
        scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        waiting = [pool.submit(client.recommend, [item], n=1) for item in (2, 3)]
        scene.wait_until(lambda: scene.engine.busy == 3)
        with scene.client() as other, pytest.raises(ServerError, match="2 requests are waiting") as caught:
            other.recommend([4])
        assert (caught.value.status, caught.value.error.type) == (429, "rate_limit_error")
        assert caught.value.retry_after == 1
        scene.gate.set()
        assert all(future.result(30).items for future in [running, *waiting])
        assert client.recommend([4]).items
        assert scene.metric("tawin_rejections_total", reason="queue_full") == 1


@pytest.mark.parametrize("waiting", [False, True], ids=["running", "waiting"])
def test_a_passed_deadline_is_504_and_the_work_is_dropped(waiting: bool) -> None:
    with serving(row_budget=1) as scene, ThreadPoolExecutor(1) as pool, scene.http() as http:
        scene.gate.clear()
        if waiting:
            first = pool.submit(scene.client().recommend, [5], n=1)
            scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        answer = http.post("/v1/recommendations", json={**ONE, "timeout_s": 0.2})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        scene.gate.set()
        if waiting:
            assert first.result(30).items
        scene.wait_until(lambda: scene.engine.busy == 0 and not scene.engine.leader.replica.searches)
        assert scene.metric("tawin_rejections_total", reason="deadline") == 1
        assert http.post("/v1/recommendations", json=ONE).status_code == 200


def test_the_servers_own_deadline_holds_for_all() -> None:
    with serving(deadline_s=0.2) as scene, scene.http() as http:
        scene.gate.clear()
        assert http.post("/v1/recommendations", json={**ONE, "timeout_s": 50}).status_code == 504
        assert http.post("/v1/completions", json={"model": "table", "prompt": "x"}).status_code == 504


def test_the_work_of_a_client_that_leaves_is_dropped() -> None:
    with serving() as scene, ThreadPoolExecutor(1) as pool:
        scene.gate.clear()
        stays = pool.submit(scene.client().recommend, [2], score_space="vocab")
        connection = raw(scene, body=b'{"history": [1], "score_space": "vocab"}')
        scene.wait_until(lambda: scene.engine.busy == 2)
        connection.close()
        scene.wait_until(lambda: scene.metric("tawin_rejections_total", reason="disconnected") == 1)
        scene.gate.set()
        assert stays.result(30).items
        scene.wait_until(lambda: scene.engine.busy == 0)
        route = {"endpoint": "data:/v1/recommendations", "code": "200"}
        scene.wait_until(lambda: scene.metric("tawin_requests_total", **route) == 1)
        connection = raw(scene)  # nothing of it holds up who comes next
        assert connection.recv(64).startswith(b"HTTP/1.1 200 ")
        connection.close()


def test_large_bodies_are_413_announced_or_not() -> None:
    with serving(max_body_kb=1) as scene, scene.http() as http:
        large = b'{"history": [1], "deny": [' + b"1," * 2000 + b"1]}"
        announced = http.post("/v1/recommendations", content=large)
        streamed = http.post("/v1/recommendations", content=iter([large[:900], large[900:]]))
        for answer in (announced, streamed):
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert http.post("/v1/recommendations", json=ONE).status_code == 200
        assert scene.metric("tawin_rejections_total", reason="body") == 2


def test_who_sends_too_much_reads_why() -> None:
    """The body is taken in to its end: closing with bytes unread would reset the connection and lose the reply."""
    with serving(max_body_kb=256) as scene, scene.http() as http:
        for _ in range(8):
            answer = http.post("/v1/recommendations", content=b" " * 1_500_000)
            assert answer.status_code == 413
        assert http.post("/v1/recommendations", json=ONE).status_code == 200


def test_who_asks_first_whether_to_send_too_much_is_told_at_once() -> None:
    with serving(max_body_kb=1) as scene:
        place = httpx.URL(scene.data)
        with socket.create_connection((place.host, place.port), timeout=30) as connection:
            head = f"POST /v1/recommendations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            connection.sendall(f"{head}Content-Length: 2000\r\nExpect: 100-continue\r\n\r\n".encode())
            assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_slow_clients_are_given_up_and_do_not_hold_up_others() -> None:
    with serving(read_timeout_s=2.0) as scene, scene.http() as http:
        slow = [raw(scene, body=b'{"history"', length=500) for _ in range(20)]
        assert http.post("/v1/recommendations", json=ONE).status_code == 200
        answers = [connection.recv(4096) for connection in slow]
        assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
        scene.wait_until(lambda: scene.metric("tawin_rejections_total", reason="slow_body") == 20)
        for connection in slow:
            connection.close()


def test_a_connection_on_which_no_request_comes_is_closed() -> None:
    with serving(read_timeout_s=0.5) as scene, scene.http() as http:
        host, port = scene.data.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as idle:
            idle.sendall(b"POST /v1/recommendations HTTP/1.1\r\nHost: x\r\n")
            assert idle.recv(100) == b""
        assert http.get("/health").status_code == 200


def test_paused_is_503_for_new_requests_while_running_ones_end() -> None:
    with serving() as scene, ThreadPoolExecutor(1) as pool, scene.controller() as control, scene.http() as http:
        scene.gate.clear()
        running = pool.submit(scene.client().recommend, [2])
        scene.wait_until(lambda: scene.engine.busy == 1)
        assert "1 requests still run" in control.pause().message
        answer = http.post("/v1/recommendations", json=ONE)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        assert control.status().state == "paused"
        scene.gate.set()
        assert running.result(30).items
        assert "0 requests still run" in control.pause(wait_s=10).message
        control.resume()
        assert http.post("/v1/recommendations", json=ONE).status_code == 200
        assert http.get("/ready").json()["status"] == "ready"


def test_a_pause_with_abort_gives_everything_up() -> None:
    with serving(row_budget=1) as scene, ThreadPoolExecutor(3) as pool, scene.controller() as control:
        scene.gate.clear()
        clients = [scene.client() for _ in range(3)]
        asked = [pool.submit(client.recommend, [item], n=1) for item, client in enumerate(clients)]
        scene.wait_until(lambda: scene.engine.busy == 3)
        paused = threading.Thread(target=lambda: control.pause(abort=True, wait_s=10))
        paused.start()
        scene.wait_until(lambda: scene.engine.closed == "paused")
        scene.gate.set()
        paused.join(20)
        for future in asked:
            error = future.exception(20)
            assert error is None or (isinstance(error, ServerError) and error.status == 503)
        assert sum(future.exception() is not None for future in asked) >= 2
        assert scene.engine.busy == 0


def test_ready_says_so_when_the_engine_hangs() -> None:
    with serving(probe_s=1.0) as scene, ThreadPoolExecutor(1) as pool, scene.http() as http:
        scene.wait_until(lambda: http.get("/ready").status_code == 200)
        assert scene.client().ready().model_dump() == {
            "status": "ready", "ranks": 1, "weight_version": 1, "catalog_version": 1,
        }  # fmt: skip
        scene.gate.clear()
        stuck = pool.submit(scene.client().recommend, [2])
        scene.wait_until(lambda: scene.engine.busy == 1 and not scene.engine._queue)
        answer = http.get("/ready")
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            503,
            "the engine does not answer (TimeoutError)",
        )
        scene.gate.set()
        assert stuck.result(30).items


def test_leaving_answers_what_runs_and_refuses_what_comes() -> None:
    with serving() as scene, ThreadPoolExecutor(1) as pool, scene.controller() as control:
        scene.gate.clear()
        running = pool.submit(scene.client().recommend, [2])
        scene.wait_until(lambda: scene.engine.busy == 1)
        connection = scene.http()
        assert connection.get("/health").status_code == 200
        control.shutdown(wait_s=20)
        refused = connection.post("/v1/recommendations", json=ONE)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        scene.gate.set()
        assert running.result(30).items
        scene.wait_until(lambda: scene.engine.failed.done())
        assert scene.engine.failed.exception() is None
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{scene.data}/health")
