"""RL whose rollouts come from generation servers equals RL in one process, whatever happens to a server meanwhile."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tawin_nemo.api.arrays import RolloutReply
from tawin_nemo.api.client import Client
from tawin_nemo.placement.server_parts import ServersLost
from tawin_nemo.serve.engine.weight_sources import FromMemory
from tawin_nemo.types import DataParallel
from tawin_nemo.util.errors import ConfigError
from tests.distributed.launch import free_port
from tests.distributed.rollout_worker import STEPS, prompts, small_catalog
from tests.serve.learning import Learned, learn, recipe, serving

#: Prompts that are searched in other company: sums of a matrix product come in another order.
SCORES, STATISTICS, WEIGHTS = 2e-5, 2e-3, 2e-4
LIMIT = 600  # seconds for a start on a machine that is busy


@pytest.fixture(scope="module")
def in_process() -> Learned:
    return learn(recipe())


def assert_same(got: Learned, expected: Learned, *, exact: bool) -> None:
    close = {"rtol": 0.0, "atol": 0.0 if exact else SCORES}
    assert len(got.rollouts) == len(expected.rollouts) == STEPS
    for ours, theirs in zip(got.rollouts, expected.rollouts, strict=True):
        assert ours.weight_version == theirs.weight_version
        for name in ("items_BG", "tokens_BGT", "lengths_BG", "is_target_BG", "inserted_BG"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("scores_BG", "logprobs_BGT"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), equal_nan=True, **close)
    for ours, theirs in zip(got.stats, expected.stats, strict=True):
        assert ours == pytest.approx(theirs, rel=0 if exact else STATISTICS, abs=0 if exact else 1e-5, nan_ok=True)
    for name, value in expected.weights.items():
        torch.testing.assert_close(got.weights[name], value, rtol=0.0, atol=0.0 if exact else WEIGHTS)


@contextmanager
def several(folder: Path, count: int) -> Iterator[list]:
    with ExitStack() as stack:
        folders = [folder / str(number) for number in range(count)]
        yield [stack.enter_context(serving(made)) for made in folders]


@pytest.mark.parametrize(
    "rl", [{}, {"negatives": "sample"}, {"negatives": "dynamic"}], ids=["beam", "sample", "dynamic"]
)
def test_one_server_is_the_same_bit_for_bit(rl: dict, in_process: Learned, tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        got = learn(recipe([served.file], tmp_path, **rl))
        assert served.engine.weights == 2 + STEPS  # its own first weights, ours before step 0, and one per step
    assert_same(got, learn(recipe(**rl)) if rl else in_process, exact=True)


def test_two_servers_share_the_prompts(in_process: Learned, tmp_path: Path) -> None:
    with several(tmp_path, 2) as servers:
        got = learn(recipe([served.file for served in servers], tmp_path))
        for served in servers:
            text = served.engine.metrics.text().decode()
            assert 'endpoint="data:/v1/rollouts"' in text
    assert_same(got, in_process, exact=False)


def test_small_parts_are_the_same_too(in_process: Learned, tmp_path: Path) -> None:
    with serving(tmp_path, token_budget=64, row_budget=8) as served:
        assert_same(learn(recipe([served.file], tmp_path)), in_process, exact=False)


@contextmanager
def process(folder: Path, tp: int = 1) -> Iterator[subprocess.Popen]:
    """A server that can be killed, ready to answer; its first rank."""
    folder.mkdir()
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.serve.learning", str(folder), str(tp)],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(tp),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(tp)
    ]
    try:
        end = time.monotonic() + LIMIT
        while not (folder / "address.json").is_file():
            assert all(rank.poll() is None for rank in ranks), "a server did not start"
            assert time.monotonic() < end, "a server did not start in time"
            time.sleep(0.1)
        yield ranks[0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.distributed
def test_a_killed_server_is_left_out_and_when_none_is_left_the_run_ends(
    in_process: Learned, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL after the first rollout: the other server answers the same parts, so nothing changes by a bit."""
    monkeypatch.setattr(logging.getLogger("tawin_nemo"), "propagate", True)
    with several(tmp_path, 2) as servers:
        undisturbed = learn(recipe([served.file for served in servers], tmp_path))
    with serving(tmp_path / "stays") as stays, process(tmp_path / "dies") as dies:
        files = [tmp_path / "dies" / "address.json", stays.file]

        def kill(step: int) -> None:
            if step == 0:
                dies.send_signal(signal.SIGKILL)
                dies.wait()

        got = learn(recipe(files, tmp_path), between=kill)
    assert_same(got, undisturbed, exact=True)
    assert_same(got, in_process, exact=False)
    assert f"generation server {files[0]} is excluded until it receives new weights: Connect" in caplog.text
    with pytest.raises(ServersLost, match="no generation server is left") as caught:  # the other one has ended as well
        got.engine.search(prompts(9, DataParallel()).prompts, 4)
    assert all(str(file) in str(caught.value) for file in files)
    assert caught.value.exit_code == 1


@pytest.mark.distributed
def test_a_server_of_two_ranks_takes_the_weights(in_process: Learned, tmp_path: Path) -> None:
    with process(tmp_path / "pair", tp=2):
        got = learn(recipe([tmp_path / "pair" / "address.json"], tmp_path))
    assert_same(got, in_process, exact=False)


def test_a_server_that_was_changed_or_restarted_is_brought_up_to_date(tmp_path: Path) -> None:
    """Rollouts of other weights are refused; with nobody else there the server gets ours again."""
    batch = prompts(9, DataParallel()).prompts
    with ExitStack() as stack:
        served = stack.enter_context(serving(tmp_path))
        engine = learn(recipe([served.file], tmp_path)).engine
        expected = engine.search(batch, 4)
        others = {name: torch.ones(size) for name, size in served.engine.leader.replica.from_tensors.sizes.items()}
        served.engine.update_weights(FromMemory(others))  # another job's
        assert torch.equal(engine.search(batch, 4).scores_BW, expected.scores_BW)
        stack.close()  # and started anew, with its own weights and at other ports
        with serving(tmp_path) as again:
            assert again.engine.weights == 1
            assert torch.equal(engine.search(batch, 4).scores_BW, expected.scores_BW)
            assert again.engine.weights > 1


def test_a_reply_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def lies(self: Client, rows: object, **fields: object) -> RolloutReply:
        asked.append(fields["weight_version"])
        said = truth(self, rows, **fields)
        return RolloutReply(**{**said.__dict__, "weight_version": said.weight_version - 1})

    with serving(tmp_path) as served:
        engine = learn(recipe([served.file], tmp_path)).engine
        truth = Client.rollouts
        monkeypatch.setattr(Client, "rollouts", lies)
        with pytest.raises(ServersLost, match=r"not answered in rollout.server_tries=4 tries: .*expected: rejected"):
            engine.search(prompts(9, DataParallel()).prompts, 4)
    assert len(asked) == 4
    assert len(set(asked)) == 4  # every try came after a new push


def test_a_server_that_does_not_fit_is_the_users_mistake(tmp_path: Path) -> None:
    other = small_catalog()
    renamed = replace(other, external_ids=[f"{name}!" for name in other.external_ids])
    with serving(tmp_path, renamed) as served, pytest.raises(ConfigError, match="serves another catalog") as caught:
        learn(recipe([served.file], tmp_path))
    assert "start it from this run's recipe" in str(caught.value)
    with serving(tmp_path) as served:
        (tmp_path / "other").mkdir()
        wrong = recipe([served.file], tmp_path)
        (tmp_path / "keys").write_text("not-the-key-0123456789")
        with pytest.raises(ConfigError, match="rejects the key"):
            learn(wrong)
        narrow = recipe([served.file], tmp_path, group_size=4)
        bf16 = replace(narrow, model=replace(narrow.model, precision="bf16"))
        with pytest.raises(ConfigError, match=r"searches in fp32 but model.precision=bf16"):
            learn(bf16)
    with pytest.raises(ServersLost, match=r"no generation server is left \(.*there is no .*nowhere/address.json"):
        learn(recipe([tmp_path / "nowhere" / "address.json"], tmp_path))
