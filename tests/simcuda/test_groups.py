"""Process groups of the pretended device take tensors of their backend only; objects travel over both."""

import pytest
import torch
import torch.distributed as dist

from tests import forked
from tests.simcuda import device
from tests.simcuda.device import DeviceFault, count
from tests.train.runs import environment


def rules(words):
    """In a process of its own, with the default group."""
    device.install()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    gloo = dist.new_group(backend="gloo")
    assert (dist.get_backend(), dist.get_backend(gloo)) == ("nccl", "gloo")
    here, there = torch.ones(2, device="cuda"), torch.ones(2)
    _, counts = count(lambda: dist.all_reduce(here))
    assert counts.total("collectives") == 1
    dist.all_reduce(there, group=gloo)
    dist.barrier(device_ids=[torch.cuda.current_device()])
    for group in (None, gloo):
        objects = [None]
        dist.all_gather_object(objects, {"a": 1}, group=group)
        assert objects == [{"a": 1}]
    assert not device.FAULTS
    with pytest.raises(DeviceFault, match=r"allreduce_ over nccl got a tensor of cpu: \[2\]"):
        dist.all_reduce(there)
    with pytest.raises(DeviceFault, match=r"broadcast_ over nccl got a tensor of cpu"):
        dist.broadcast(there, src=0)
    with pytest.raises(DeviceFault, match="allreduce_ over gloo got a tensor of cuda"):
        dist.all_reduce(here, group=gloo)
    dist.destroy_process_group()


@pytest.mark.slow
def test_groups_take_tensors_of_their_backend(tmp_path):
    process = forked.start(rules, [], environment(), tmp_path / "log")
    failed, hung = forked.finish([process], 120)
    assert not failed, (tmp_path / "log").read_text()
    assert not hung
