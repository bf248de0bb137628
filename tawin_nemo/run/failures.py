"""Log files of every attempt and rank, and error files for the launcher.

``RUN_DIR/logs/attempt_N/rank_R.log`` is the log of a rank, with the traceback of the error that ended it. The error is
also written to the file that torchrun names (``TORCHELASTIC_ERROR_FILE``); under srun, which names none, to
``rank_R.error.json`` beside the log. ``record`` of ``torch.distributed.elastic`` would also write a file for a stop on
request, and a kill can leave its files half written, so only its ``ErrorHandler`` is used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from tawin_nemo.models.megatron.parallel import disaggregated, runtime
from tawin_nemo.util.errors import Preempted
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
#: Seconds that a rank waits after the loss of another rank, so that the launcher sees the other rank's end first.
PATIENCE = 5.0
_SYMPTOM = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|closed by peer|remote process exited|ncclRemoteError|"
    r"NCCL.*(abort|unhandled)|no longer connected",
    re.IGNORECASE,
)

_TIME_OUT = re.compile(
    r"timed out waiting|wait timeout|collective operation timeout|timed out or failed|socket timeout|"
    r"operations have failed or timed out",
    re.IGNORECASE,
)


def is_time_out(message: str) -> bool:
    """Whether an error message says that another rank did not take part in a collective within the time limit."""
    return _TIME_OUT.search(message) is not None


def is_symptom(message: str) -> bool:
    """Whether an error message only reports the loss of another rank."""
    return _SYMPTOM.search(message) is not None


class _AtomicErrorFile(ErrorHandler):
    """Writes torch's error file atomically.

    A rank that is killed while it writes would leave a file that the launcher cannot read; the launcher would then fail
    itself instead of naming the rank.
    """

    def record_exception(self, e: BaseException) -> None:
        file = self._get_error_file_path()
        if not file:
            return
        os.environ[ERROR_FILE] = f"{file}.part"
        with contextlib.suppress(OSError):  # a full disk: the error itself matters more
            super().record_exception(e)
            Path(f"{file}.part").replace(file)
        os.environ[ERROR_FILE] = file


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Write an error that leaves the block to the error file; a crash of the interpreter prints its stack."""
    handler = _AtomicErrorFile()
    handler.initialize()
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        handler.record_exception(error)
        if disaggregated.job_size() > 1 and (is_symptom(str(error)) or is_time_out(str(error))):
            log.warning("rank %d lost another rank (%s)", runtime.world_rank(), str(error).splitlines()[0])
            time.sleep(PATIENCE)
        raise


@dataclass(frozen=True)
class OpenLog:
    """Message to the rollout ranks: open a log file of attempt ``number`` in ``folder``."""

    folder: Path
    number: int


@contextlib.contextmanager
def attempt_logs(run_dir: Path) -> Iterator[None]:
    """Log to ``RUN_DIR/logs/attempt_N/rank_R.log`` inside the block; N counts the attempts of this run from 1."""
    number = runtime.on_rank_0(partial(_next_attempt, run_dir))
    into = OpenLog(run_dir / "logs" / f"attempt_{number}", number)
    if disaggregated.is_disaggregated():
        disaggregated.rollout_channel().broadcast(into)
    with logging_into(into):
        yield


@contextlib.contextmanager
def logging_into(into: OpenLog) -> Iterator[None]:
    """Write this rank's log file inside the block; its last line says how the rank ended."""
    rank, folder = runtime.world_rank(), into.folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(ERROR_FILE, str(folder / f"rank_{rank}.error.json"))
    root, file = logging.getLogger("tawin_nemo"), logging.FileHandler(folder / f"rank_{rank}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for screen in root.handlers:  # other ranks than 0 only warn there
        screen.setLevel(max(screen.level, root.level))
    before = root.level
    root.addHandler(file)
    root.setLevel(logging.INFO)
    try:
        log.info("attempt %d, rank %d of %d, process %d", into.number, rank, disaggregated.job_size(), os.getpid())
        yield
        file.handle(_record(logging.INFO, "finished"))
    except Preempted as state:
        file.handle(_record(logging.INFO, str(state)))
        raise
    except BaseException as error:
        file.handle(_record(logging.ERROR, f"rank {rank} ends with an error", error))
        raise
    finally:
        root.setLevel(before)
        root.removeHandler(file)
        file.close()


def _record(level: int, message: str, error: BaseException | None = None) -> logging.LogRecord:
    """A record for the log file alone."""
    trace = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord(log.name, level, __file__, 0, message, None, trace)


def _next_attempt(run_dir: Path) -> int:
    folders = (run_dir / "logs").glob("attempt_*")
    return 1 + max((int(path.name[8:]) for path in folders if path.name[8:].isdigit()), default=0)
