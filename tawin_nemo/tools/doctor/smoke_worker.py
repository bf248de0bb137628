"""One process of the all-reduce test: ``python -m tawin_nemo.tools.doctor.smoke_worker [--as-training]``.

The place comes from the launcher's variables. With ``--as-training`` the process group is the one that training makes
(srun's variables understood too); without, torch's own, which starts in a fraction of the time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

ELEMENTS, ROUNDS = 2**20, 5


def start(*, as_training: bool) -> torch.device:
    """Join the group; the device that this process computes on."""
    if as_training:
        from tawin_nemo.config.schema import ModelConfig
        from tawin_nemo.models.megatron.parallel import runtime

        runtime.initialize(ModelConfig(), seed=0)
        return runtime.device()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method="env://", timeout=timedelta(seconds=120))
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def measure(device: torch.device) -> float:
    """Bus bandwidth in bytes per second: 2 (n - 1) / n times the size, over the time (nccl-tests, PERFORMANCE.md).

    Raises RuntimeError when a sum is wrong; every element must be 1 + 2 + ... + n, exactly.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    expected, seconds = size * (size + 1) / 2, 0.0
    for round_ in range(ROUNDS + 1):
        values = torch.full((ELEMENTS,), float(rank + 1), device=device)
        begin = time.monotonic()
        dist.all_reduce(values)
        low, high = float(values.min()), float(values.max())  # waits for the GPU
        if round_ > 0:  # the first round also opens the connections
            seconds += time.monotonic() - begin
        if low != expected or high != expected:
            raise RuntimeError(f"rank {rank}: sums lie in {low}..{high}, not at {expected}")
    return 2 * (size - 1) / size * 4 * ELEMENTS * ROUNDS / seconds


def main(as_training: bool) -> None:
    speed = measure(start(as_training=as_training))
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    print(json.dumps({"processes": size, "bytes_per_s": speed} if rank == 0 else {"quiet": True}), flush=True)


if __name__ == "__main__":
    main("--as-training" in sys.argv[1:])
