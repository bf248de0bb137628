"""Starts several processes on this machine through torchrun's launcher and reports the first failure.

On several machines without Slurm every machine runs the same command, and the launchers meet (``util.launch.hosts``).

The command torchrun is not used, for two reasons. It kills its processes ``GRACE`` seconds after a signal, but writing
a checkpoint may take minutes: here signals are forwarded and the processes end by themselves. And it names the process
whose error came first, but a process that lost another one may report that before the other one's end is seen. When a
process dies, the others end within seconds, and the last lines on the screen name it with its error.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import psutil

from tawin_nemo.run.failures import is_symptom, is_time_out
from tawin_nemo.run.signals import SIGNALS
from tawin_nemo.util.errors import Preempted, UserError
from tawin_nemo.util.launch import Hosts, hosts

#: Seconds that the other processes get after one has died, before they are killed.
GRACE = 10
_PR_SET_PDEATHSIG = 1


def launch(processes: int, argv: Sequence[str], *, results: Collection[int] = ()) -> int:
    """Start one process per device of this machine; exit code of the first failure, 1 for a kill, 75 after a signal.

    ``results``: exit codes of a rank that are a result and not a failure.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    job = hosts() or Hosts("localhost:0", 1, uuid.uuid4().hex)
    config = LaunchConfig(
        min_nodes=job.count, max_nodes=job.count, nproc_per_node=processes, run_id=job.job,
        rdzv_backend="c10d", rdzv_endpoint=job.head, max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT", shutdown_timeout=GRACE,
    )  # fmt: skip
    forwarded: list[int] = []

    def forward(number: int, frame: object) -> None:
        forwarded.append(number)
        for child in psutil.Process().children():
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        elastic_launch(config, sys.executable)("-m", "tawin_nemo", *argv)
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        alone = job.count == 1  # a launcher knows the ranks of its own machine only
        hung = hung_ranks(error.failures, processes) if alone and is_time_out(str(failure.message)) else []
        return int(failure.exitcode) if failure.exitcode in results else _report(rank, failure, forwarded, hung)
    except SignalException as error:  # torch's launcher has handed it on and waited for the processes
        print(f"tawin-nemo: {error.sigval.name}; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + int(error.sigval)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def end_with_launcher() -> None:
    """Make Linux kill this process when its launcher is killed, so that two attempts never write into one run.

    Uses ``prctl(PR_SET_PDEATHSIG)``. No effect on processes that torchrun did not start, and on other systems.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _report(rank: int, failure: Any, forwarded: Sequence[int], hung: Sequence[int] = ()) -> int:
    """Print the first failure with its traceback on stderr; returns the exit code of the job.

    ``hung``: ranks that ``rank`` waited for until the time limit; the last line then names them.
    """
    if failure.exitcode == Preempted.exit_code or (forwarded and -failure.exitcode in forwarded):
        return Preempted.exit_code
    if hung:
        names = f"rank {hung[0]}" if len(hung) == 1 else f"ranks {', '.join(map(str, hung))}"
        print(
            f"{_traceback(failure)}tawin-nemo: {names} hung or was too slow: rank {rank} waited in vain until the time "
            "limit of collectives (trainer.collective_timeout), the job ends with it; the same command continues from "
            "the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return 1
    ended = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
    print(
        f"tawin-nemo: rank {rank} (process {failure.pid} on {socket.gethostname()}) {ended}, the job ends with it\n"
        f"{_traceback(failure)}tawin-nemo: rank {rank} {ended}; the same command continues from the last checkpoint",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return int(failure.exitcode) if failure.exitcode > 0 else 1


def _traceback(failure: Any) -> str:
    """Traceback of a rank from its error file; empty for a UserError, whose message is already on the screen."""
    message = failure.message if isinstance(failure.message, dict) else {}
    text = str(message.get("extraInfo", {}).get("py_callstack", ""))
    return "" if failure.exitcode == UserError.exit_code or not text else f"{text.rstrip()}\n"


def first_failure(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The failure that caused the others: a kill before an error, an error before the loss of a peer, then by time.

    Ended by the launcher itself are those with SIGTERM, and those with SIGKILL ``GRACE`` seconds after an error: a rank
    that was killed by something else is seen before, as the others report its loss within ``PATIENCE`` seconds.
    """
    errors = [failure.timestamp for failure in failures.values() if failure.exitcode > 0]

    def order(item: tuple[int, Any]) -> tuple[bool, bool, bool, int, int]:
        rank, failure = item
        late = bool(errors) and failure.timestamp >= min(errors) + GRACE - 1
        ended = failure.exitcode == -signal.SIGTERM or (failure.exitcode == -signal.SIGKILL and late)
        waited = is_symptom(str(failure.message)) or is_time_out(str(failure.message))
        return ended, failure.exitcode > 0, waited, failure.timestamp, rank

    return min(failures.items(), key=order)


def hung_ranks(failures: Mapping[int, Any], processes: int) -> list[int]:
    """The ranks that did not report a time-out, while others waited for them; empty when all did."""
    waited = [rank for rank, failure in failures.items() if is_time_out(str(failure.message))]
    return [rank for rank in range(processes) if rank not in waited] if waited else []
