"""The collective over real gloo processes."""

import pytest

from tawin_nemo.tools.doctor import smoke, smoke_worker
from tawin_nemo.tools.doctor.check import Status
from tawin_nemo.tools.doctor.probe import Found, Library

FOUND = Found({"torch": Library("2.13.0")})


@pytest.mark.distributed
def test_two_processes_add_up(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen = smoke.all_reduce(FOUND, 1, launched=False)
    assert seen.status == Status.OK, seen
    assert seen.value.startswith("gloo, 2 processes: sums are right, ")


@pytest.mark.distributed
def test_a_launched_process_joins_the_group_as_training_does(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    seen = smoke.all_reduce(FOUND, 1, launched=True)
    assert seen.status == Status.OK, seen
    assert "1 processes" in seen.value


def test_a_wrong_sum_is_noticed(monkeypatch):
    monkeypatch.setattr(smoke_worker.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(smoke_worker.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(smoke_worker.dist, "all_reduce", lambda values: None)
    with pytest.raises(RuntimeError, match=r"sums lie in 1.0\.\.1.0, not at 3.0"):
        smoke_worker.measure(smoke_worker.torch.device("cpu"))
