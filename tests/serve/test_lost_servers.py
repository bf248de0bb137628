"""A rollout server that is killed, hangs, comes back or joins late in the middle of a step costs a retry: the run
learns the same, bit for bit, as on servers that nothing happened to."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx
import pytest
import torch

from tawin_nemo.api.client import Client
from tawin_nemo.placement.server_parts import ServersLost
from tawin_nemo.run import signals
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import ConfigError, Preempted
from tests import failpoints, forked
from tests.distributed.rollout_worker import prompts, small_catalog
from tests.serve import learning
from tests.serve.learning import Learned, learn, recipe, serving
from tests.serve.scene import KEY, metric_in
from tests.serve.test_learning import assert_same, several
from tests.train.runs import environment

LIMIT = 120  # seconds for a start on a machine that is busy
#: Model calls of a server: two for its part of a search, so this is in the middle of the second of three steps.
IN_A_STEP = 4
#: A server that is only slow is taken for hung as well on a busy machine, and waited for.
HANG = {"server_silent_s": 2.0, "server_wait_s": float(LIMIT)}


@dataclass
class ServerProcess:
    """A server in a process of its own, with its files in ``folder``."""

    folder: Path
    running: ForkServerProcess | None = None

    @property
    def file(self) -> Path:
        return self.folder / "address.json"

    def start(self, rules: str = "") -> ServerProcess:
        """Start it, with failpoints, and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        self.file.unlink(missing_ok=True)
        env = {**environment(), failpoints.VARIABLE: rules}
        self.running = forked.start(learning.process, [str(self.folder), "1"], env, self.folder / "log")
        end = time.monotonic() + LIMIT
        while not self.file.is_file():
            assert self.running.exitcode is None, (self.folder / "log").read_text()
            assert time.monotonic() < end, "a server did not start in time"
            time.sleep(0.02)
        return self

    def send(self, number: signal.Signals) -> None:
        assert self.running is not None
        assert self.running.pid is not None
        os.kill(self.running.pid, number)

    @property
    def stopped(self) -> bool:
        assert self.running is not None
        text = Path(f"/proc/{self.running.pid}/stat").read_text(encoding="utf-8")
        return text.rpartition(")")[2].split()[0] == "T"

    def answered(self) -> float:
        """How many rollout requests it has answered."""
        url = json.loads(self.file.read_text())["data"]
        text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        return metric_in(text, "tawin_requests_total", endpoint="data:/v1/rollouts", code="200")

    def end(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.join()


@contextmanager
def server_process(folder: Path, rules: str | None = "") -> Iterator[ServerProcess]:
    """Without rules (None) it is not started yet."""
    made = ServerProcess(folder)
    try:
        yield made if rules is None else made.start(rules)
    finally:
        made.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """On two servers that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with several(folder, 2) as servers:
        return learn(recipe([served.file for served in servers], folder))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("tawin_nemo"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def until(happens: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.02)


@pytest.mark.distributed
def test_one_that_is_killed_in_the_middle_of_a_step(
    undisturbed: Learned, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as stays, server_process(tmp_path / "dies", f"server.searching=kill@{IN_A_STEP}") as dies:
        got = learn(recipe([dies.file, stays.file], tmp_path))
        assert dies.running is not None
        dies.running.join(10)
        assert dies.running.exitcode == -signal.SIGKILL
    assert_same(got, undisturbed, exact=True)
    lost = f"generation server {dies.file} is excluded until it receives new weights: "
    assert f"{lost}RemoteProtocolError" in log.text or f"{lost}ReadError" in log.text
    assert f"prompts of {dies.file} are sent again (try 2 of 4)" in log.text


@pytest.mark.distributed
def test_one_that_hangs_in_the_middle_of_a_step_and_goes_on_later(
    undisturbed: Learned, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    batch = prompts(9, DataParallel()).prompts
    with serving(tmp_path) as stays, server_process(tmp_path / "hangs", f"server.searching=stop@{IN_A_STEP}") as hangs:
        start = time.monotonic()
        got = learn(recipe([hangs.file, stays.file], tmp_path, options=HANG))
        assert hangs.stopped
        assert time.monotonic() - start < 50, "it was waited for until its own time limit"
        assert_same(got, undisturbed, exact=True)
        assert f"generation server {hangs.file} is excluded" in log.text
        assert "has not answered /health for 2 s (rollout.server_silent_s)" in log.text
        expected = got.engine.search(batch, 4)
        hangs.send(signal.SIGCONT)
        before = hangs.answered()

        def answers() -> bool:
            assert torch.equal(got.engine.search(batch, 4).scores_BW, expected.scores_BW)
            return hangs.answered() > before

        until(answers)
    assert f"generation server {hangs.file} is available, with the current weights, after" in log.text


@pytest.mark.distributed
def test_one_that_starts_late_gets_the_current_weights_first(
    undisturbed: Learned, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    batch = prompts(9, DataParallel()).prompts
    with serving(tmp_path) as there, server_process(tmp_path / "late", None) as late:
        got = learn(recipe([late.file, there.file], tmp_path), between=lambda step: late.start() if step == 1 else None)
        assert_same(got, undisturbed, exact=True)
        expected = got.engine.search(batch, 4)

        def answers() -> bool:
            assert torch.equal(got.engine.search(batch, 4).scores_BW, expected.scores_BW)
            return late.answered() > 0

        until(answers)
        with Client(json.loads(late.file.read_text())["data"], KEY) as client:
            assert client.rollout_terms().weight_version > 1  # 1 is what it started with
    assert f"generation server {late.file} is available, with the current weights, after" in log.text


@pytest.mark.distributed
def test_the_only_one_is_killed_and_comes_back_while_the_step_waits(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    with server_process(tmp_path / "only", f"server.searching=kill@{IN_A_STEP}") as only:

        def supervise() -> None:
            first = only.running
            assert first is not None
            first.join(LIMIT)
            only.start()

        supervisor = threading.Thread(target=supervise)
        supervisor.start()
        got = learn(recipe([only.file], tmp_path, options={"server_wait_s": float(LIMIT)}))
        supervisor.join()
    assert_same(got, learn(recipe()), exact=True)
    assert f"no generation server is left; waiting up to {LIMIT} s for one (rollout.server_wait_s)" in log.text
    assert f"generation server {only.file} is available, with the current weights, after" in log.text


def test_without_any_the_run_ends_after_the_limit_with_the_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prompts(9, DataParallel()).prompts
    with serving(tmp_path) as served:
        engine = learn(recipe([served.file], tmp_path, options={"server_wait_s": 1.5})).engine
    start = time.monotonic()
    with pytest.raises(ServersLost, match=r"rollout.server_wait_s=1\.5 s; the first loss was .*address.json: \w+Error"):
        engine.search(batch, 4)
    assert 1.5 <= time.monotonic() - start < 30
    monkeypatch.setattr(signals, "received", lambda: "SIGTERM")
    with pytest.raises(Preempted, match="SIGTERM while no generation server is left"):
        engine.search(batch, 4)


def test_one_that_comes_back_as_another_server_is_left_out(
    undisturbed: Learned, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """With narrower limits it would divide prompts in another way."""
    with ExitStack() as stack, serving(tmp_path / "a") as stays:
        second = stack.enter_context(serving(tmp_path / "b"))

        def swap(step: int) -> None:
            if step == 0:
                stack.close()
                stack.enter_context(serving(tmp_path / "b", token_budget=64))

        got = learn(recipe([second.file, stays.file], tmp_path), between=swap)
    assert_same(got, undisturbed, exact=True)
    assert "is below those of the servers that this run began with" in log.text


def test_the_only_one_comes_back_with_another_catalog_which_is_the_users_mistake(tmp_path: Path) -> None:
    other = small_catalog()
    renamed = replace(other, external_ids=[f"{name}!" for name in other.external_ids])
    with serving(tmp_path) as served:
        engine = learn(recipe([served.file], tmp_path, options={"server_wait_s": float(LIMIT)})).engine
    with serving(tmp_path, renamed), pytest.raises(ConfigError, match="serves another catalog"):
        engine.search(prompts(9, DataParallel()).prompts, 4)
