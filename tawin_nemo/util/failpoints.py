"""Named points at which a test can kill this process or simulate a full disk, set by ``TAWIN_FAILPOINTS``.

The variable holds ``POINT=ACTION[@PASS][/RANK]``, several separated by commas: at the PASS-th time (default 1) that the
process reaches POINT it does ACTION, on every rank or only on RANK. Actions: ``kill`` (SIGKILL), ``kill:MS`` (the same
MS milliseconds later, asynchronously), ``term`` (SIGTERM), ``enospc`` (the error of a full disk), ``raise``
(any other error). Each writes a line to stderr, so that a test can count the failures it has caused.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from typing import BinaryIO

from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.launch import read_launch

VARIABLE = "TAWIN_FAILPOINTS"
POINTS = (
    "save.before_write",  # before the first byte of a checkpoint
    "save.mid_shard",  # half of a tensor is in the shard's file
    "save.before_rename",  # every file is written and fsynced, under the temporary name
    "save.replacing",  # an older checkpoint of this name is moved away, the new one not yet in its place
    "save.after_rename",
    "prune.mid",  # an old checkpoint has been renamed but not removed
    "log.mid_line",  # half of a line of metrics.jsonl or timings.jsonl
    "rl.after_rollout",
    "rollout_rank.asked",  # a rollout rank has received prompts
    "file.before_rename",  # any JSON, report or table that is written under a temporary name
)
_RULE = re.compile(r"([\w.]+)=(kill|kill:\d+|term|enospc|raise)(?:@(\d+))?(?:/(\d+))?")


@dataclass
class _Rule:
    """An action at one point; ``left`` is the number of passes until it happens."""

    point: str
    action: str
    left: int
    rank: int | None


_rules: list[_Rule] = []


def arm(text: str) -> None:
    """Replace all rules by those in ``text`` (syntax as in the module docstring); an empty text removes them.

    Raises ConfigError for a malformed rule or an unknown point.
    """
    _rules[:] = [_parsed(part) for part in text.split(",") if part]


def _parsed(part: str) -> _Rule:
    match = _RULE.fullmatch(part)
    if match is None or match[1] not in POINTS:
        raise ConfigError(
            f"{VARIABLE}: {part!r} is not POINT=kill|kill:MS|term|enospc|raise[@PASS][/RANK] with a POINT of "
            f"{', '.join(POINTS)}"
        )
    return _Rule(match[1], match[2], int(match[3] or 1), int(match[4]) if match[4] else None)


def reach(point: str) -> None:
    """Perform the action of every rule whose turn it is at ``point``."""
    for rule in _rules:
        if rule.point == point and rule.rank in (None, read_launch().rank):
            rule.left -= 1
            if rule.left == 0:
                _act(rule)


def write(file: BinaryIO, data: bytes | memoryview, point: str) -> None:
    """Write ``data`` to ``file``, reaching ``point`` after half of the bytes are flushed."""
    if not _rules:
        file.write(data)
        return
    half = len(data) // 2
    file.write(data[:half])
    file.flush()
    reach(point)
    file.write(data[half:])


def _act(rule: _Rule) -> None:
    action, _, delay = rule.action.partition(":")
    os.write(2, f"failpoint {rule.point}: {rule.action}\n".encode())
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if action == "raise":
        raise RuntimeError(f"failpoint {rule.point}")
    number = signal.SIGTERM if action == "term" else signal.SIGKILL
    if delay:
        threading.Thread(target=_send, args=(number, int(delay) / 1000), daemon=True).start()
        return
    _send(number, 0.0)


def _send(number: signal.Signals, seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), number)


arm(os.environ.get(VARIABLE, ""))
