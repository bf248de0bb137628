"""Failpoints: parsed strictly, counted, limited to a rank, and nothing at all when none is armed."""

from __future__ import annotations

import errno
import io
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tawin_nemo.util import failpoints
from tawin_nemo.util.errors import ConfigError


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_nothing_happens_unarmed():
    for point in failpoints.POINTS:
        failpoints.reach(point)
    file = io.BytesIO()
    failpoints.write(file, b"abc", "log.mid_line")
    assert file.getvalue() == b"abc"


def test_acts_at_its_pass_only():
    failpoints.arm("log.mid_line=enospc@2,save.before_write=raise")
    failpoints.reach("log.mid_line")
    with pytest.raises(OSError) as raised:
        failpoints.reach("log.mid_line")
    assert raised.value.errno == errno.ENOSPC
    failpoints.reach("log.mid_line")
    with pytest.raises(RuntimeError, match=r"save.before_write"):
        failpoints.reach("save.before_write")


def test_is_in_the_middle_of_the_bytes():
    failpoints.arm("log.mid_line=raise")
    file = io.BytesIO()
    with pytest.raises(RuntimeError):
        failpoints.write(file, b"abcdef", "log.mid_line")
    assert file.getvalue() == b"abc"


def test_belongs_to_a_rank(monkeypatch):
    failpoints.arm("log.mid_line=raise/1")
    monkeypatch.setenv("RANK", "0")
    failpoints.reach("log.mid_line")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError):
        failpoints.reach("log.mid_line")


@pytest.mark.parametrize("text", ["save.nowhere=kill", "save.before_write=explode", "save.before_write", "=kill"])
def test_a_text_that_means_nothing_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"save\.mid_shard"):
        failpoints.arm(text)


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("kill:5", signal.SIGKILL)])
def test_kills_for_real(action: str, number: int):
    program = (
        "import time; from tawin_nemo.util import failpoints; failpoints.reach('save.before_write'); time.sleep(60)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), failpoints.VARIABLE: f"save.before_write={action}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=50)
    assert done.returncode == -number
    assert b"failpoint save.before_write" in done.stderr
