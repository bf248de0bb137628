"""Starts N processes of a worker script with the environment that torchrun gives them, forked from one that has
imported everything (``tests.forked``), and shows the failing rank's own traceback."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests import forked

#: Seconds until a launch counts as hung.
LIMIT = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(worker: Path, processes: int, *arguments: str, folder: Path, limit: float = LIMIT) -> None:
    """Run ``python worker arguments`` on each rank; AssertionError with the first failing rank's output otherwise."""
    env = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(processes))
    root = worker.parents[2]  # this checkout, whichever one is installed
    env.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=f"{root}{os.pathsep}{worker.parent}")
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    started = [
        forked.start(forked.script, [str(worker), *arguments], {**env, "RANK": rank, "LOCAL_RANK": rank}, log)
        for rank, log in zip(map(str, range(processes)), logs, strict=True)
    ]
    failed, hung = forked.finish(started, limit)
    if failed:
        tail = logs[failed[0]].read_text(errors="replace")[-4000:]
        raise AssertionError(f"rank {failed[0]} of {processes} ended with {started[failed[0]].exitcode}:\n{tail}")
    if hung:
        tail = logs[hung[0]].read_text(errors="replace")[-2000:]
        raise AssertionError(f"ranks {hung} of {processes} still ran after {limit:.0f} s; rank {hung[0]} said:\n{tail}")
