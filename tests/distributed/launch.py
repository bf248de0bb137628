"""Starts N processes of a worker script as torchrun would, and shows the failing rank's own traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

#: Seconds until a launch counts as hung; starting a process takes about 10 s here.
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
    started = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(worker), *arguments]
        with log.open("wb") as out:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env={**env, **place}, stdout=out, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + limit
    try:
        while any(process.poll() is None for process in started):
            failed = [rank for rank, process in enumerate(started) if process.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        failed = [rank for rank, process in enumerate(started) if process.poll() not in (None, 0)]
        hung = [rank for rank, process in enumerate(started) if process.poll() is None]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    if failed:
        tail = logs[failed[0]].read_text(errors="replace")[-4000:]
        raise AssertionError(f"rank {failed[0]} of {processes} ended with {started[failed[0]].returncode}:\n{tail}")
    if hung:
        tail = logs[hung[0]].read_text(errors="replace")[-2000:]
        raise AssertionError(f"ranks {hung} of {processes} still ran after {limit:.0f} s; rank {hung[0]} said:\n{tail}")
