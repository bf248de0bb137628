"""One attempt of a training run in a process of its own, killed, signalled or let alone.

Processes are forked from this one, which has imported everything before: an attempt then takes the time of its work,
not ten seconds of imports. Kills are real SIGKILLs of a real process; nothing of it survives but its files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import failpoints
from tests.train.runs import SMALL, command, environment

#: Seconds after which an attempt counts as hung.
LIMIT = 300.0
#: SFT (6 checkpoints), RL (4), one evaluation of each: the smallest run with every kind of file.
RECIPE = (
    *SMALL, "sft.epochs=1", "compare.sft_continued=false", "data.eval_limit=8", "eval.splits=[valid]",
    "eval.beams=4", "reference.refresh=ema", "rl.beta=0.01",
)  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """How it ended: exit code (negative: the signal that killed it), wall seconds, what it said on stderr."""

    code: int
    seconds: float
    said: str
    cpu: float = 0.0
    seconds_after: float = 0.0  # from a failpoint to the end of all processes

    @property
    def last_words(self) -> str:
        return "\n".join(self.said.strip().splitlines()[-12:])


def warm_up() -> None:
    """Import what an attempt needs, so that forked ones need not."""
    import tawin_nemo.commands.session
    import tawin_nemo.models.megatron.checkpoint.checkpoint  # noqa: F401


def attempt(
    overrides: list[str],
    *,
    rules: str = "",
    after: float | None = None,
    term_when: Callable[[str], bool] | None = None,
    fsize: int = 0,
    words: Sequence[str] = ("train", *RECIPE),
    log: Path | None = None,
) -> Attempt:
    """Run the verb and overrides ``words`` and then ``overrides`` with failpoint ``rules``; no file above ``fsize``
    bytes.

    SIGKILL comes ``after`` seconds of the processor, which mean the same on a busy machine; SIGTERM as soon as
    ``term_when`` holds of what is on the screen, which goes to ``log`` (None: beside the run directory).
    """
    if log is None:
        log = Path(next(item for item in overrides if item.startswith("run_dir=")).removeprefix("run_dir=") + ".log")
    start = time.monotonic()
    log.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _child([*words, *overrides], rules, fsize, log)
    code, used = None, 0.0
    while code is None:
        if after is not None and _cpu(pid) >= after:
            os.kill(pid, signal.SIGKILL)
            after = None
        if term_when is not None and log.is_file() and term_when(log.read_text(encoding="utf-8", errors="replace")):
            os.kill(pid, signal.SIGTERM)
            term_when = None
        if time.monotonic() - start > LIMIT:
            os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"an attempt ran for more than {LIMIT:.0f} s: {log}")
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            code, used = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.002)
    return Attempt(code, time.monotonic() - start, log.read_text(encoding="utf-8", errors="replace"), used)


def _cpu(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(arguments: list[str], rules: str, fsize: int, log: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if fsize:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
        failpoints.arm(rules)
        from tawin_nemo.cli import main

        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launched(overrides: list[str], *, rules: str = "", term_at: str = "") -> Attempt:
    """The same with two processes, through the command line and its launcher.

    ``term_at``: SIGTERM to the launcher once that is on the screen.
    """
    arguments = command(*RECIPE, *overrides, "trainer.devices=2")
    start = time.monotonic()
    process = subprocess.Popen(
        arguments, env={**environment(), **failpoints.environment(rules)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines, failed = [], None
    assert process.stderr is not None
    for line in process.stderr:  # ends with the last process that holds the stream
        lines.append(line)
        if line.startswith("failpoint"):
            failed = time.monotonic()
        if term_at and term_at in line:
            process.send_signal(signal.SIGTERM)
            term_at = ""
    code, end = process.wait(LIMIT), time.monotonic()
    return Attempt(code, end - start, "".join(lines), seconds_after=end - failed if failed else 0.0)


def fingerprint(run_dir: Path) -> dict[str, str]:
    """What two equal runs share: metrics, evaluations, checksums of the weights and optimizer a stage hands on."""
    found = {
        str(path.relative_to(run_dir)): path.read_text(encoding="utf-8")
        for pattern in ("*/metrics.jsonl", "*/eval/*.json", "*/done.json")
        for path in sorted(run_dir.glob(pattern))
    }
    for done in sorted(run_dir.glob("*/done.json")):
        chosen = json.loads(done.read_text(encoding="utf-8"))["chosen_step"]
        checkpoint = done.parent / "checkpoints" / f"step_{chosen}"
        files = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["files"]
        shards = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}
        found[str(checkpoint.relative_to(run_dir))] = json.dumps(shards, sort_keys=True)
    return found


def difference(run_dir: Path, reference: dict[str, str]) -> str:
    """Names of what differs from the uninterrupted run; empty when nothing does."""
    mine = fingerprint(run_dir)
    return ", ".join(name for name in sorted({*mine, *reference}) if mine.get(name) != reference.get(name))
