"""A server under load follows two nights with a changed catalog, and a rollback: no request fails or is mixed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tawin_nemo.api.client import Client
from tests import forked
from tests.serve.scene import KEY
from tests.serve.test_process import process_of
from tests.tools.retrain.shop import FIRST, LEAVES, NEW, OLD, SECOND, words, write_log
from tests.train.runs import environment

NEW_ITEMS = {f"I{number}" for number in range(OLD, OLD + NEW)}
CLIENTS, LIMIT = 3, 240.0


def night(root: Path, log: Path, day: str, screen: Path, *overrides: str) -> int:
    """A night in a process of its own; its exit code."""
    verb, *rest = words(root, log, day, *overrides)
    process = forked.start(forked.verb, [verb, *rest], environment(), screen)
    process.join(LIMIT)
    return int(process.exitcode)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.05)


@pytest.mark.full
def test_a_server_follows_two_nights_and_a_rollback_without_a_failed_request(tmp_path):
    root, log, run = tmp_path / "root", tmp_path / "log", tmp_path / "serve_run"
    write_log(log)
    assert night(root, log, FIRST, tmp_path / "night1") == 0, (tmp_path / "night1").read_text()[-4000:]
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    options = [f"serve.follow={root}", "serve.follow_s=0.2", f"run_dir={run}", f"serve.api_keys_file={keys}"]
    with (
        (tmp_path / "server.log").open("w") as screen,
        process_of(run / "serve" / "address.json", *options, "trainer.threads=1", log=screen) as served,
        ThreadPoolExecutor(CLIENTS) as pool,
        served.controller() as control,
    ):
        assert control.status().followed_version == FIRST
        stop, replies = threading.Event(), []

        def ask(client_number: int) -> None:
            with Client(served.data, KEY) as client:
                for turn in range(10**9):
                    if stop.is_set():
                        return
                    history = [f"I{(turn * 7 + client_number) % OLD:02}", LEAVES]
                    reply = client.recommend(history, n=40, beams=40)  # raises for every failed request
                    replies.append((reply.weight_version, reply.catalog_version, {i.external_id for i in reply.items}))

        asking = [pool.submit(ask, number) for number in range(CLIENTS)]
        assert night(root, log, SECOND, tmp_path / "night2") == 0, (tmp_path / "night2").read_text()[-4000:]
        wait_for(lambda: control.status().followed_version == SECOND)
        before = len(replies)
        wait_for(lambda: len(replies) > before + 20)
        screen_of_rollback = tmp_path / "rollback"
        back = forked.start(
            forked.verb, ["retrain", "rollback", f"retrain.root={root}"], environment(), screen_of_rollback
        )
        back.join(LIMIT)
        assert back.exitcode == 0, screen_of_rollback.read_text()
        wait_for(lambda: control.status().followed_version == FIRST)
        before = len(replies)
        wait_for(lambda: len(replies) > before + 20)
        stop.set()
        for future in asking:
            future.result(LIMIT)  # 0 failed requests: the first one would be raised here
        assert_pairs(replies)
        (root / "latest" / "items.jsonl").write_text("broken")  # also a live version that breaks does no harm
        assert control.status().state == "serving"
    assert json.loads((root / "versions" / SECOND / "version.json").read_text())["against"] == FIRST


def assert_pairs(replies: list[tuple[int, int, set[str]]]) -> None:
    """Every reply is of one version: its weights, its catalog and no item of another one."""
    assert {(weights, catalog) for weights, catalog, _ in replies} == {(1, 1), (2, 2), (3, 3)}
    for _, catalog, items in replies:
        assert bool(items & NEW_ITEMS) == (catalog == 2)
        assert (LEAVES in items) == (catalog != 2)
