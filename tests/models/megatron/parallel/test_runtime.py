"""Start of the process groups: what the launcher says, what is refused, and seeds as a function of the step."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.checkpoint.async_save import AsyncSaver
from tawin_nemo.models.megatron.parallel import groups, runtime
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.launch import rendezvous


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[1-2]", "node1"), ("gpu7", "gpu7"), ("a-[003,007],b2", "a-003"), ("n1,n2", "n1"), ("", "127.0.0.1")],
)
def test_first_node_of_a_step(nodes: str, first: str) -> None:
    assert rendezvous({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "7"}) == (first, 20007)
    assert rendezvous({"MASTER_ADDR": "host", "MASTER_PORT": "9", "SLURM_NODELIST": nodes}) == ("host", 9)


def test_layout_that_does_not_divide_the_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size=2 x .*=3 = 6 does not divide .* processes, 1"):
        runtime.initialize(ModelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3), seed=1)


def test_one_process_is_a_complete_layout() -> None:
    runtime.initialize(ModelConfig(), seed=1)
    runtime.initialize(ModelConfig(), seed=1)  # a second call is harmless
    place = runtime.data_parallel()
    assert (place.rank, place.size, place.gather("x")) == (0, 1, ["x"])
    assert runtime.is_first_stage()
    assert runtime.is_last_stage()
    assert runtime.rank_layout()["tp_size"] == runtime.rank_layout()["pp_size"] == runtime.rank_layout()["dp_size"] == 1
    assert runtime.gather_objects({"a": 1}) == [{"a": 1}]
    runtime.barrier()


def test_attention_on_a_gpu_builds_no_cudnn_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN builds a plan for every new shape of queries and keys, and no two RL steps have the same shapes."""
    runtime.initialize(ModelConfig(), seed=1)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        runtime.initialize(ModelConfig(), seed=1)
        assert torch.backends.cuda.cudnn_sdp_enabled()  # a CPU is left alone
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        runtime.initialize(ModelConfig(), seed=1)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class _RecordedStream:
    """A CUDA stream that notes who waits for whom and what is copied in it."""

    def __init__(self, name: str, log: list[tuple[str, ...]]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: _RecordedStream) -> None:
        self._log.append((self.name, "waits for", other.name))

    def __enter__(self) -> None:
        self._log.append((self.name, "copies"))

    def __exit__(self, *error: object) -> None:
        pass


def test_copies_within_a_rank_wait_for_what_makes_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.initialize(ModelConfig(), seed=1)
    groups.copy_service.cache_clear()
    log: list[tuple[str, ...]] = []
    current = _RecordedStream("current", log)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: _RecordedStream("copies' own", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    try:
        service = groups.copy_service()
        source, target = torch.arange(3.0), torch.zeros(3)
        service.submit_send_with_id(0, source, 0)
        service.submit_recv_with_id(0, target, 0)
        service.run()
    finally:
        groups.copy_service.cache_clear()
    assert torch.equal(source, target)
    assert log == [
        ("copies' own", "waits for", "current"), ("copies' own", "copies"), ("current", "waits for", "copies' own"),
    ]  # fmt: skip


def test_seeds_depend_on_seed_and_step_only() -> None:
    def draws(seed: int, step: int) -> torch.Tensor:
        runtime.seed_step(seed, step)
        with get_cuda_rng_tracker().fork():
            split = torch.rand(4)
        return torch.cat([torch.rand(4), split])

    runtime.initialize(ModelConfig(), seed=1)
    first = draws(7, 3)
    draws(7, 4)
    assert torch.equal(draws(7, 3), first)
    assert not torch.equal(draws(7, 4), first)
    assert not torch.equal(draws(8, 3), first)
    assert not torch.equal(first[:4], first[4:])  # tensor-parallel regions draw from a generator of their own


def test_every_group_has_the_time_limit_that_is_asked_for() -> None:
    limit = timedelta(minutes=7.5)
    runtime.shutdown()
    try:
        runtime.initialize(ModelConfig(), seed=1, limit=limit)
        groups.copy_service(), groups.rollout_groups(1, 1), groups.rollout_replicas(1, 1), AsyncSaver()
        made = list(dist.distributed_c10d._world.pg_map)
        limits = [group._get_backend(torch.device("cpu")).options._timeout for group in made]
        assert len(limits) > 20
        assert set(limits) == {limit}
    finally:
        runtime.shutdown()
    runtime.initialize(ModelConfig(), seed=1)
    assert groups.time_limit() == groups.TIMEOUT
