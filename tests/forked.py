"""Processes forked from one that has imported everything: a run then takes the time of its work, not of ten seconds of
imports.

One such server per pytest worker (Python's own ``forkserver``), started at the first use; it imports and does nothing
else, so that no thread, process group or random generator is handed on. Every process is one of its own otherwise: with
its environment, working directory, standard streams, exit code, and open to signals. What must be true of a start from
nothing (imports, entry points, the launcher) is tested without this, in tests/commands/test_cli.py,
tests/run/test_launcher.py and wherever ``subprocess`` is used.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from tests import failpoints

ROOT = Path(__file__).parents[1]


@cache
def _context() -> ForkServerContext:
    """The server, importing; with one thread and without GPUs, as a test's processes are."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.forked_imports"])
    with _surroundings({**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()
    return context


@contextmanager
def _surroundings(environment: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(
    main: Callable[[Sequence[str]], int | None], words: Sequence[str], environment: Mapping[str, str], out: Path,
    err: Path | None = None,
) -> ForkServerProcess:  # fmt: skip
    """``sys.exit(main(words))`` in a process whose stdout and stderr go to these files (``out`` alone: both)."""
    arguments = (main, list(words), dict(environment), str(out), str(err or out))
    process = _context().Process(target=_child, args=arguments)
    process.start()
    return process


def _child(
    main: Callable[[Sequence[str]], int | None], words: list[str], environment: dict[str, str], out: str, err: str
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, flags, 0o644), stream)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)
    failpoints.arm(environment.get(failpoints.VARIABLE, ""))
    sys.exit(main(words))


def script(words: Sequence[str]) -> None:
    """``python words[0] words[1:]``."""
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def verb(words: Sequence[str]) -> int:
    """``python -m tawin_nemo words``."""
    from tawin_nemo.cli import main

    sys.argv = ["tawin-nemo", *words]
    return main(list(words))


def finish(processes: Sequence[ForkServerProcess], limit: float) -> tuple[list[int], list[int]]:
    """Wait until all have ended or one has failed; the ranks that failed and those that ran for too long.

    None of them is left when this returns.
    """
    deadline = time.monotonic() + limit
    try:
        while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                break
            time.sleep(0.02)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        hung = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return failed, hung


def call(
    words: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    limit: float,
    main: Callable[[Sequence[str]], int | None] = verb,
) -> subprocess.CompletedProcess[str]:
    """``python -m tawin_nemo words``, or ``main(words)``, in one process per environment, until all have ended or one
    has failed.

    Exit code and streams are those of the first process, or of the first that failed. Raises
    ``subprocess.TimeoutExpired`` after ``limit`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="forked_") as name:
        files = [(Path(name) / f"{rank}.out", Path(name) / f"{rank}.err") for rank in range(len(environments))]
        processes = [
            start(main, words, environment, *streams) for environment, streams in zip(environments, files, strict=True)
        ]
        failed, hung = finish(processes, limit)
        shown = (failed or hung or [0])[0]
        said = [file.read_text(encoding="utf-8", errors="replace") if file.exists() else "" for file in files[shown]]
    if hung and not failed:
        raise subprocess.TimeoutExpired(["tawin_nemo", *words], limit, *said)
    return subprocess.CompletedProcess(["tawin_nemo", *words], processes[shown].exitcode or 0, *said)
