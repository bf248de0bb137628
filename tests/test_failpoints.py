"""The points of failure are where they say, counted, limited to a rank; the product itself knows nothing of them."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tawin_nemo.models.megatron.checkpoint.checkpoint
import tawin_nemo.placement.rollout_ranks
import tawin_nemo.serve.engine.replica
import tawin_nemo.train.rl  # noqa: F401
from tawin_nemo.config.schema import TrainerConfig
from tawin_nemo.run.stage import Stage
from tawin_nemo.util.files import write_json
from tests import failpoints

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_the_product_does_not_know_them():
    for folder in ("tawin_nemo", "data_prep"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "failpoint" not in path.read_text(encoding="utf-8").lower(), path


@pytest.mark.parametrize("point", failpoints.POINTS)
def test_a_patch_is_taken_back(point: str):
    site = failpoints.SITES[point]
    *classes, name = site.name.split(".")
    owner = sys.modules[site.module]
    for part in classes:
        owner = getattr(owner, part)
    before = getattr(owner, name)
    failpoints.arm(f"{point}=raise@1000")
    assert getattr(owner, name) is not before
    failpoints.arm("")
    assert getattr(owner, name) is before


def test_acts_at_its_pass_only(tmp_path: Path):
    failpoints.arm("file.before_rename=enospc@2")
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(OSError) as raised:
        write_json(tmp_path / "b.json", 2)
    assert raised.value.errno == errno.ENOSPC
    write_json(tmp_path / "c.json", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "c.json"]


def test_two_points_at_once(tmp_path: Path):
    failpoints.arm("log.mid_line=raise,file.before_rename=enospc")
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError, match=r"log\.mid_line"):
        Stage(tmp_path / "rl", TrainerConfig()).write(1, {"loss": 1.0})


def test_is_in_the_middle_of_a_line(tmp_path: Path):
    Stage(tmp_path, TrainerConfig()).write(1, {"loss": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    failpoints.arm("log.mid_line=raise")
    with pytest.raises(RuntimeError):
        Stage(tmp_path, TrainerConfig()).write(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole + whole[: len(whole) // 2]


def test_is_in_the_middle_of_a_shard(tmp_path: Path):
    failpoints.arm("save.mid_shard=raise@2")
    frame, tensor = b"f" * 100, bytes(range(256)) * 8
    for name, others in (("__0_0.distcp", True), ("other.distcp", False)):
        with pathlib.Path(tmp_path / name).open("wb") as file:
            file.write(frame)
            if others:
                file.write(tensor)
                file.write(tensor)  # only the first tensor of a file counts
                continue
            with pytest.raises(RuntimeError, match=r"save\.mid_shard"):
                file.write(tensor)
            assert (tmp_path / name).read_bytes() == frame + tensor[:1024]
    assert (tmp_path / "__0_0.distcp").read_bytes() == frame + tensor + tensor


def test_belongs_to_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failpoints.arm("file.before_rename=raise/1")
    monkeypatch.setenv("RANK", "0")
    write_json(tmp_path / "a.json", 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError):
        write_json(tmp_path / "b.json", 1)


@pytest.mark.parametrize("text", ["save.nowhere=kill", "save.before_write=explode", "save.before_write", "=kill"])
def test_a_text_that_means_nothing_is_an_error(text: str):
    with pytest.raises(ValueError, match=r"save\.mid_shard"):
        failpoints.arm(text)


PROGRAM = "import sys, time; from tawin_nemo.util.files import write_json; {}(sys.argv[1]); time.sleep(60)"
WRITE = "(lambda name: write_json(__import__('pathlib').Path(name), 1))"


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("kill:500", signal.SIGKILL)])
def test_kills_a_process_of_its_own(action: str, number: int, tmp_path: Path):
    environment = {**os.environ, **failpoints.environment(f"file.before_rename={action}")}
    call = [sys.executable, "-c", PROGRAM.format(WRITE), str(tmp_path / "a.json")]
    done = subprocess.run(call, env=environment, capture_output=True, timeout=50)
    assert done.returncode == -number
    assert b"failpoint file.before_rename" in done.stderr
    assert (tmp_path / "a.json").exists() == (action != "kill")


def test_a_module_is_patched_when_it_is_imported():
    program = (
        "import sys; from tests import failpoints; assert 'tawin_nemo.train.rl' not in sys.modules\n"
        "import tawin_nemo.train.rl as rl, json\n"
        "print(json.dumps([hasattr(rl.rollout_metrics, '__wrapped__'), hasattr(rl.count_flops, '__wrapped__')]))"
    )
    environment = {**os.environ, **failpoints.environment("rl.after_rollout=raise")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, False]
