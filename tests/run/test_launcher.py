"""A process that dies ends the job with its name and traceback on the screen; log files and run id per attempt."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.failures import attempt_logs, is_symptom, is_time_out, recorded
from tawin_nemo.run.launcher import first_failure, hung_ranks
from tawin_nemo.run.logging import with_run_id
from tawin_nemo.util.errors import Preempted
from tests.crash_matrix.attempts import launched
from tests.crash_matrix.cases import LAYOUT, RANK_LIMIT

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2023"

TIMED_OUT = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:80] Timed out waiting 2000ms for recv operation"


@dataclass(frozen=True)
class Failure:
    exitcode: int
    message: Any
    timestamp: int


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ({0: Failure(1, LOST, 5), 1: Failure(-signal.SIGKILL, "Signal 9", 7)}, 1),
        ({0: Failure(1, LOST, 5), 1: Failure(1, "ValueError: no", 5)}, 1),
        ({0: Failure(-signal.SIGTERM, "Signal 15", 5), 1: Failure(1, "ValueError: no", 6)}, 1),
        ({0: Failure(1, "ValueError: no", 6), 1: Failure(1, "ValueError: no", 5)}, 1),
        ({0: Failure(1, "ValueError: no", 5), 1: Failure(1, "ValueError: no", 5)}, 0),
        ({0: Failure(1, TIMED_OUT, 5), 1: Failure(-signal.SIGKILL, "Signal 9", 20)}, 0),
        ({0: Failure(1, "ValueError: no", 5), 1: Failure(-signal.SIGKILL, "Signal 9", 15)}, 0),
        ({0: Failure(1, TIMED_OUT, 5), 1: Failure(1, "ValueError: no", 6)}, 1),
    ],
    ids=[
        "kill",
        "error before lost peer",
        "ended by the launcher",
        "earlier",
        "lower rank",
        "killed by the launcher after a time-out",
        "killed by the launcher after an error",
        "error before time-out",
    ],
)
def test_the_failure_that_caused_the_others(failures: dict[int, Failure], first: int):
    assert first_failure(failures)[0] == first


def test_the_ranks_that_hung_are_those_that_report_no_time_out():
    killed = Failure(-signal.SIGKILL, "Signal 9", 20)
    failures = {0: Failure(1, TIMED_OUT, 5), 1: killed, 2: Failure(1, TIMED_OUT, 6), 3: Failure(-15, "Signal 15", 9)}
    assert hung_ranks(failures, 4) == [1, 3]
    assert hung_ranks({0: Failure(1, "ValueError: no", 5), 1: killed}, 2) == []
    assert is_time_out(TIMED_OUT)
    assert not is_time_out(LOST)


HANG = """
import sys, time
from datetime import timedelta
from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.run.failures import recorded
from tawin_nemo.run.signals import listening
with recorded(), listening():
    runtime.initialize(ModelConfig(), seed=0, limit=timedelta(seconds=3))
    runtime.barrier()
    while runtime.world_rank() == 1:
        time.sleep(0.1)
    runtime.gather_objects(1)
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_the_last_line_after_a_time_out_names_the_rank_that_hung(tmp_path):
    """Of three ranks one hangs; the launcher kills it, and possibly others, and none of those kills is the cause."""
    (tmp_path / "tawin_nemo_hang.py").write_text(HANG)
    start = "import sys; from tawin_nemo.run import launcher; launcher.GRACE = 10; sys.exit(launcher.launch(3, []))"
    start = start.replace(
        "sys.exit(launcher.launch(3, []))",
        "from torch.distributed.elastic.multiprocessing.api import PContext; "
        "PContext.close.__defaults__ = (None, 11); "  # not 30 seconds until what was terminated is killed
        "import torch.distributed.launcher.api as api; real = api.elastic_launch; "
        "api.elastic_launch = lambda config, entry: lambda *words: real(config, entry)('-m', 'tawin_nemo_hang'); "
        "sys.exit(launcher.launch(3, []))",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr[-3000:]
    assert last.startswith("tawin-nemo: rank 1 hung or was too slow: rank "), done.stderr[-3000:]
    assert "trainer.collective_timeout" in last
    assert "SIGKILL" not in last


def test_losing_a_peer_is_told_from_an_error():
    assert is_symptom(LOST)
    assert not is_symptom("ValueError: the loss is nan")


def test_an_error_file_is_whole_or_not_there(tmp_path, monkeypatch):
    """What torch's launcher reads; a part of it would make the launcher itself fail."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(ValueError, match="no"), recorded():
        raise ValueError("no")
    assert "ValueError: no" in json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"]
    assert list(tmp_path.iterdir()) == [file]
    assert os.environ["TORCHELASTIC_ERROR_FILE"] == str(file)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    with pytest.raises(ValueError, match="no"), recorded():  # a file that cannot be written hides no error
        raise ValueError("no")


def test_every_attempt_has_its_own_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "given by torchrun")
    runtime.initialize(ModelConfig(), seed=0)
    logger = logging.getLogger("tawin_nemo.test")
    with attempt_logs(tmp_path):
        logger.info("one")
    with pytest.raises(ZeroDivisionError), attempt_logs(tmp_path):
        raise ZeroDivisionError("two")
    with pytest.raises(Preempted), attempt_logs(tmp_path):
        raise Preempted("SIGTERM: saved")
    first, second, third = ((tmp_path / "logs" / f"attempt_{n}" / "rank_0.log").read_text() for n in (1, 2, 3))
    assert "tawin_nemo.test: one" in first
    assert "two" not in first
    assert "Traceback" in second
    assert "ZeroDivisionError: two" in second
    assert "SIGTERM: saved" in third
    assert "Traceback" not in third


def test_the_run_id_is_the_same_in_every_attempt(tmp_path):
    section = {"create_wandb_logger": True, "wandb_logger_kwargs": {"project": "p"}}
    first = with_run_id(section, tmp_path)["wandb_logger_kwargs"]
    assert first == with_run_id(section, tmp_path)["wandb_logger_kwargs"]
    assert first["project"] == "p"
    assert len(first["id"]) == 12
    assert first["resume"] == "allow"
    own = {"create_wandb_logger": True, "wandb_logger_kwargs": {"id": "mine"}}
    assert with_run_id(own, tmp_path)["wandb_logger_kwargs"]["id"] == "mine"
    assert with_run_id({"create_tensorboard_logger": True}, tmp_path / "none") == {"create_tensorboard_logger": True}
    assert not (tmp_path / "none").exists()


@pytest.mark.distributed
def test_one_of_two_processes_fails_or_is_killed(small_dataset, tmp_path):
    overrides = [f"data.root={small_dataset}", f"run_dir={tmp_path}", LAYOUT]
    raised = launched(overrides, rules="save.before_write=raise/1")
    assert (raised.code, 0 < raised.seconds_after < RANK_LIMIT) == (1, True), raised.last_words
    assert "RuntimeError: failpoint save.before_write" in raised.last_words
    assert raised.last_words.splitlines()[-1].startswith("tawin-nemo: rank 1 ended with 1")
    killed = launched(overrides, rules="save.mid_shard=kill/1")
    assert (killed.code, 0 < killed.seconds_after < RANK_LIMIT) == (1, True), killed.last_words
    assert killed.last_words.splitlines()[-1].startswith("tawin-nemo: rank 1 was killed by SIGKILL")
    log = (tmp_path / "logs" / "attempt_1" / "rank_1.log").read_text(encoding="utf-8")
    assert "RuntimeError: failpoint save.before_write" in log


CHILD = "from tawin_nemo.run.launcher import end_with_launcher; end_with_launcher(); print('up', flush=True); input()"
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_worker_does_not_outlive_a_killed_launcher(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        child = psutil.Process(int((said - {"up"}).pop()))
        parent.kill()
        assert parent.wait() == -signal.SIGKILL
    assert psutil.wait_procs([child], timeout=60)[1] == []
