"""Starting, watching and ending the processes, without torch, and the collective over real gloo processes."""

import os
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tawin_nemo.tools.doctor import all_reduce
from tawin_nemo.tools.doctor.all_reduce import Failure, local_environments, run_workers
from tawin_nemo.tools.doctor.check import Status
from tawin_nemo.tools.doctor.probe import Found, Library

FOUND = Found({"torch": Library("2.13.0")})


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, sys, time\nrank = os.environ['RANK']\n{text}"]


def test_places_are_what_a_launcher_would_set():
    first, second = local_environments(2)
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_the_result_is_rank_0s_json_line_whatever_libraries_print_around_it():
    text = "print('NCCL version 2'); print('{\"processes\": 2, \"rank\": %s}' % rank); print('bye', file=sys.stderr)"
    assert run_workers(python(text), local_environments(2), 60) == {"processes": 2, "rank": 0}


def test_the_first_failure_ends_all_processes(tmp_path):
    text = f"""
open(os.path.join({str(tmp_path)!r}, rank), 'w').write(str(os.getpid()))
if rank == '0': time.sleep(100)
while len(os.listdir({str(tmp_path)!r})) < 2: time.sleep(0.01)
sys.exit('connection refused')"""
    start = time.monotonic()
    assert run_workers(python(text), local_environments(2), 90) == Failure(1, 1, "connection refused")
    assert time.monotonic() - start < 80
    assert not psutil.pid_exists(int((tmp_path / "0").read_text()))


def test_processes_that_hang_are_named_and_ended():
    result = run_workers(python("print('waiting', flush=True)\ntime.sleep(100)"), local_environments(2), 8)
    assert result == Failure(0, None, "waiting")


@pytest.mark.parametrize(
    ("text", "part"),
    [("sys.exit('address in use')", "ended with 1: address in use"), ("time.sleep(99)", "still ran after")],
)
def test_a_failure_becomes_a_check_with_a_remedy(monkeypatch, text, part):
    monkeypatch.setattr(all_reduce, "WORKER", python(text))
    seen = all_reduce.all_reduce(FOUND, 1, launched=False, limit_s=8)
    assert seen.status == Status.FAILS
    assert part in seen.value
    assert "GLOO_SOCKET_IFNAME" in seen.remedy


def test_a_launched_process_starts_one_worker_in_its_own_place(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    text = """
if sys.argv[1:] == ["--as-training"] and rank == "3":
    print('{"processes": 4, "bytes_per_s": 1073741824}')"""
    monkeypatch.setattr(all_reduce, "WORKER", python(text))
    seen = all_reduce.all_reduce(FOUND, 1, launched=True, limit_s=60)
    assert seen.value == "gloo, 4 processes: sums are right, 1.00 GiB/s per process"
    assert "RANK" in os.environ


def test_without_torch_there_is_nothing_to_try():
    assert all_reduce.all_reduce(Found(), 1, launched=False).status == Status.ABSENT


# -- the collective
@pytest.mark.distributed
def test_two_processes_add_up(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen = all_reduce.all_reduce(FOUND, 1, launched=False)
    assert seen.status == Status.OK, seen
    assert seen.value.startswith("gloo, 2 processes: sums are right, ")


@pytest.mark.distributed
def test_a_launched_process_joins_the_group_as_training_does(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    seen = all_reduce.all_reduce(FOUND, 1, launched=True)
    assert seen.status == Status.OK, seen
    assert "1 processes" in seen.value


def test_a_wrong_sum_is_noticed(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda values: None)
    with pytest.raises(RuntimeError, match=r"sums lie in 1.0\.\.1.0, not at 3.0"):
        all_reduce.measure(torch.device("cpu"))
