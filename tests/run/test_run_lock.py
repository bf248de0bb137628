"""One writer in a run directory: who holds the lock, when it is stale, and what the second one is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tawin_nemo.run import run_lock as module
from tawin_nemo.run.run_lock import LOCK, Locked, Owner, run_lock
from tawin_nemo.util.errors import UserError
from tests.train.runs import SMALL, called, command, environment

HOLDER = """
import sys, time
from pathlib import Path
from tawin_nemo.run.run_lock import run_lock
with run_lock(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "STALE_S", 2.0)
    monkeypatch.setattr(module, "ENDING_S", 0.3)


def holder(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def lie(folder: Path, age: float = 0.0, **changes: object) -> Owner:
    """Write a lock as another process would have left it, touched ``age`` seconds ago."""
    owner = replace(Owner.here("train"), token="other", **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    then = time.time() - age
    os.utime(folder / LOCK, (then, then))
    return owner


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_writer_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(Locked) as refused, run_lock(tmp_path, "prepare"):
            pass
        assert refused.value.exit_code == UserError.exit_code == 2
        owner = Owner.of((tmp_path / LOCK).read_text())
        assert owner is not None
        assert owner.pid == process.pid
        for word in (str(tmp_path), f"process {process.pid} on {os.uname().nodename}", f"since {owner.since}", "UTC"):
            assert word in str(refused.value)
        assert files(tmp_path) == [LOCK]
    finally:
        process.communicate("\n", timeout=30)
    assert files(tmp_path) == []
    with run_lock(tmp_path, "prepare"):
        assert files(tmp_path) == [LOCK]
    assert files(tmp_path) == []


def test_of_many_that_start_together_one_at_a_time_writes(tmp_path: Path) -> None:
    inside, refused, most = [0], [0], [0]

    def one() -> None:
        try:
            with run_lock(tmp_path, "train"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(1.0)
                inside[0] -= 1
        except Locked:
            refused[0] += 1

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], refused[0]) == (1, 7)
    assert files(tmp_path) == []


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = holder(tmp_path)
    process.kill()
    process.wait()
    begun = time.monotonic()
    with run_lock(tmp_path, "train"):
        owner = Owner.of((tmp_path / LOCK).read_text())
        assert owner is not None
        assert owner.pid == os.getpid()
    assert time.monotonic() - begun < 1.5
    assert f"was left by process {process.pid}" in caplog.text
    assert "taken over" in caplog.text
    assert files(tmp_path) == []


def test_a_later_process_with_the_same_id_holds_nothing(tmp_path: Path) -> None:
    old = lie(tmp_path, start=1)  # this process's id, but another start
    with run_lock(tmp_path, "train"):
        owner = Owner.of((tmp_path / LOCK).read_text())
        assert owner is not None
        assert owner.token != old.token
        assert (owner.pid, owner.start != 1) == (old.pid, True)
    assert files(tmp_path) == []


def test_another_host_is_believed_while_it_touches_the_lock(tmp_path: Path) -> None:
    lie(tmp_path, age=0.5, host="elsewhere", space="another boot", pid=1)
    stop = threading.Event()

    def beats() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beats)
    thread.start()
    try:
        with pytest.raises(Locked, match="process 1 on elsewhere"), run_lock(tmp_path, "train"):
            pass
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("age", [0.0, 60.0])
def test_another_host_that_is_gone_is_waited_for_no_longer_than_the_limit(
    tmp_path: Path, age: float, caplog: pytest.LogCaptureFixture
) -> None:
    lie(tmp_path, age=age, host="elsewhere", space="another boot", pid=1)
    begun = time.monotonic()
    with run_lock(tmp_path, "train"):
        waited = time.monotonic() - begun
    assert waited < (4.0 if age == 0 else 0.5)
    assert "was left by process 1 on elsewhere" in caplog.text


def test_a_job_that_slurm_starts_again_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lie(tmp_path, host="elsewhere", space="another boot", pid=1, job="77", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begun = time.monotonic()
    with run_lock(tmp_path, "train"):
        assert time.monotonic() - begun < 0.5


def test_a_lock_that_names_nobody_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("half a rec")
    with run_lock(tmp_path, "train"):
        pass
    assert files(tmp_path) == []


def test_a_lock_is_touched_while_it_is_held(tmp_path: Path) -> None:
    with run_lock(tmp_path, "train"):
        then = time.time() - 100
        os.utime(tmp_path / LOCK, (then, then))
        time.sleep(0.5)
        assert (tmp_path / LOCK).stat().st_mtime > then + 50


def test_who_was_taken_over_ends_without_writing(tmp_path: Path) -> None:
    code = HOLDER.replace("import sys, time", "import sys, time, tawin_nemo.run.run_lock as m; m.BEAT_S = 0.05")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    (tmp_path / LOCK).unlink()
    lie(tmp_path)
    assert process.wait(30) == 1
    assert process.stderr is not None
    said = process.stderr.read()
    assert "has taken" in said
    assert Owner.of((tmp_path / LOCK).read_text()).token == "other"  # type: ignore[union-attr]


def test_without_hard_links_the_file_is_made_exclusively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with run_lock(tmp_path, "train"), pytest.raises(Locked), run_lock(tmp_path, "train"):
        pass
    assert files(tmp_path) == []


def test_an_unused_folder_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "runs" / "new", "prepare"):
        raise ZeroDivisionError
    assert not (tmp_path / "runs" / "new").exists()


def test_what_killed_writers_left_goes_after_success_only(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    left = [tmp_path / ".data.tmpab12cd_9", tmp_path / "sft" / ".done.json.ab12cd_9.tmp.json"]
    kept = [tmp_path / ".step_1.tmp", tmp_path / ".hidden", tmp_path / "sft" / "a.tmp", tmp_path / ".bashrc.old"]
    for path in (*left, *kept):
        path.touch()
        os.utime(path, (1, 1))
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path, "train"):
        raise ZeroDivisionError
    assert all(path.exists() for path in left)
    with run_lock(tmp_path, "train"):
        young = tmp_path / ".young.json.ab12cd_9.tmp.json"
        young.touch()
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in (*kept, young))


def test_drafts_of_waiters_that_were_killed_are_removed(tmp_path: Path) -> None:
    for name, age in (("old", 100), ("young", 0)):
        draft = tmp_path / f".{LOCK}.{name}"
        draft.touch()
        os.utime(draft, (time.time() - age, time.time() - age))
    with run_lock(tmp_path, "train"):
        assert files(tmp_path) == [f".{LOCK}.young", LOCK]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_of_two_runs_that_start_together_one_trains_and_the_other_says_why(
    small_dataset: Path, tmp_path: Path, devices: int
) -> None:
    words = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}", f"trainer.devices={devices}"]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: called(*words), range(2))
    done, refused = sorted((first, second), key=lambda ended: ended.returncode)
    assert (done.returncode, refused.returncode) == (0, 2), refused.stderr[-3000:]
    assert "is in use by process" in refused.stderr
    assert "(train, since " in refused.stderr
    assert "Traceback" not in refused.stderr
    hidden = {path.name for path in (tmp_path / "run").rglob("*") if path.name.startswith(".") or path.name == LOCK}
    assert hidden == {".metadata"}
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_a_run_that_was_killed_continues_at_once(small_dataset: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "sft" / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    done = called(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"was left by process {process.pid}" in done.stderr
    assert not (tmp_path / "run" / LOCK).exists()
