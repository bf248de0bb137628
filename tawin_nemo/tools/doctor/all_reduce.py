"""An all-reduce over real processes: the part of a start that breaks most often, in seconds instead of in a job.

Alone, the doctor starts the processes itself: one per GPU with NCCL, or two on the CPU with gloo. Started by srun or
torchrun it takes part with every process of the job, and the group is made the way training makes it, so that a
preflight of a cluster job crosses the nodes. ``python -m tawin_nemo.tools.doctor.all_reduce [--as-training]`` is one of
the processes; the launcher's variables tell its rank. With ``--as-training`` the process group is the one that training
makes (srun's variables understood too); without, torch's own, which starts in a fraction of the time.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any

from tawin_nemo.tools.doctor.check import Check, absent, check, fails, ok
from tawin_nemo.tools.doctor.probe import Found
from tawin_nemo.util.launch import read_launch

if TYPE_CHECKING:
    import torch

#: Seconds for start, imports and the collective. NCCL's own time limit is 10 minutes: nobody should wait for it here.
LIMIT_S = 180.0
#: The same in a job, where processes may begin minutes apart: imports from a cold shared file system.
JOB_LIMIT_S = 600.0
WORKER = (sys.executable, "-W", "ignore", "-m", "tawin_nemo.tools.doctor.all_reduce")
CPU_PROCESSES = 2
#: float32 numbers that are summed, and how many times.
ELEMENTS, ROUNDS = 2**20, 5


@dataclass(frozen=True)
class Failure:
    """The first process that ended badly, or (``code`` None) one that still ran when the time was over."""

    rank: int
    code: int | None
    last_words: str


@check("all-reduce")
def all_reduce(found: Found, processes: int, *, launched: bool, limit_s: float = 0.0) -> Check:
    """``processes``: how many the recipe starts on this machine; ``launched``: by srun or torchrun, as one of many."""
    limit_s = limit_s or (JOB_LIMIT_S if launched else LIMIT_S)
    if not found.library("torch").version or found.library("torch").error:
        return absent("needs torch")
    backend = "NCCL" if found.torch.cuda_available else "gloo"
    if launched:
        environments: list[dict[str, str]] = [{}]
    else:
        gpus = len(found.torch.gpus)
        environments = local_environments(max(1, min(processes, gpus)) if gpus else CPU_PROCESSES)
    result = run_workers([*WORKER, *(["--as-training"] if launched else [])], environments, limit_s)
    if isinstance(result, Failure):
        how = f"still ran after {limit_s:.0f} s" if result.code is None else f"ended with {result.code}"
        who = read_launch().rank if launched else result.rank
        return fails(f"{backend}: process {who} {how}: {result.last_words}", _remedy(backend, launched))
    if result.get("quiet"):  # another process of the job has the figures
        return ok(f"{backend}: took part")
    speed = result["bytes_per_s"] / 2**30
    value = f"{backend}, {result['processes']} processes: sums are right, {speed:.2f} GiB/s per process"
    return ok(value)


def _remedy(backend: str, launched: bool) -> str:
    if backend == "NCCL":
        return (
            "run it again with NCCL_DEBUG=INFO; usual causes: NCCL_SOCKET_IFNAME names no interface, small /dev/shm, "
            "a process of another job on a GPU" + (", MASTER_ADDR not reachable from this node" if launched else "")
        )
    return "export GLOO_SOCKET_IFNAME=lo on one machine (else the interface that the nodes share)"


def local_environments(processes: int) -> list[dict[str, str]]:
    """What a launcher would set for each of the processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(processes)]


def run_workers(
    command: Sequence[str], environments: Sequence[dict[str, str]], limit_s: float
) -> dict[str, Any] | Failure:
    """Start ``command`` once per environment; rank 0's JSON line, or the first failure. No process is left behind."""
    deadline = time.monotonic() + limit_s
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+b")) for _ in environments]
        children = [
            stack.enter_context(_child(command, environment, log))
            for environment, log in zip(environments, logs, strict=True)
        ]
        while any(child.poll() is None for child in children):
            if time.monotonic() > deadline or any(child.poll() for child in children):
                break
            time.sleep(0.05)
        ended = sorted(enumerate(children), key=lambda pair: pair[1].poll() is None)  # those that hang come last
        for number, child in ended:
            if child.poll() != 0:
                return Failure(number, child.returncode, _last_line(logs[number]))
        return dict(json.loads(_lines(logs[0], "{")[-1]))


@contextmanager
def _child(command: Sequence[str], environment: dict[str, str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    child = subprocess.Popen(command, env=settings, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def _lines(log: IO[bytes], beginning: str = "") -> list[str]:
    """Lines with something on them; libraries write theirs before and after the worker's JSON."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    return [line for line in lines if line and line.startswith(beginning)]


def _last_line(log: IO[bytes]) -> str:
    return next(reversed(_lines(log)), "no output")


# -- one of the processes
def start(*, as_training: bool) -> torch.device:
    """Join the group; returns the device that this process computes on."""
    if as_training:
        from tawin_nemo.config.schema import ModelConfig
        from tawin_nemo.models.megatron.parallel import runtime

        runtime.initialize(ModelConfig(), seed=0)
        return runtime.device()
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method="env://", timeout=timedelta(seconds=120))
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def measure(device: torch.device) -> float:
    """Bus bandwidth in bytes per second: 2 (n - 1) / n times the size, over the time (nccl-tests, PERFORMANCE.md).

    Raises RuntimeError when a sum is wrong; every element must be 1 + 2 + ... + n, exactly.
    """
    import torch
    import torch.distributed as dist

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
    import torch.distributed as dist

    speed = measure(start(as_training=as_training))
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    print(json.dumps({"processes": size, "bytes_per_s": speed} if rank == 0 else {"quiet": True}), flush=True)


if __name__ == "__main__":
    main("--as-training" in sys.argv[1:])
