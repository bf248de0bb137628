"""SIGKILL at a random step, the same command again: the same metrics and the same weights, bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import failpoints, forked
from tests.train.runs import SMALL, called, environment, metrics, run

#: Stage and optimizer step after which the process is killed; the steps are drawn once, with a seed.
DRAW = random.Random(20261121)
DROPOUT = [*SMALL, "model.dropout=0.1"]
KILLS = [("sft", DRAW.randint(2, 9)), ("sft_continued", 1), ("rl", DRAW.randint(1, 3))]


@pytest.fixture(scope="module")
def uninterrupted(small_dataset, tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    run(*DROPOUT, f"data.root={small_dataset}", f"run_dir={directory}")
    return directory


def signal_after(arguments: list[str], log: Path, lines: int, number: signal.Signals) -> tuple[int, str]:
    """Start a run and send it a signal as soon as ``log`` has that many lines; its exit code and its last words."""
    screen = log.parents[1].with_suffix(".screen")
    process = forked.start(forked.verb, ["train", *arguments], environment(), screen)
    give_up = time.monotonic() + 300
    while time.monotonic() < give_up and process.exitcode is None:
        if log.is_file() and len(log.read_bytes().splitlines()) >= lines:
            break
        time.sleep(0.002)
    alive = process.exitcode is None
    if alive:
        os.kill(process.pid, number)
    _, hung = forked.finish([process], 300)
    words = screen.read_text(encoding="utf-8", errors="replace")[-3000:]
    assert alive, f"the run ended before the signal:\n{words}"
    assert not hung, f"the run went on for 300 s after {number.name}:\n{words}"
    return process.exitcode, words


def exported(run_dir: Path, stage: str, target: Path) -> bytes:
    """All weights of a stage, through the Hugging Face export."""
    run(f"checkpoint={run_dir / stage}", f"run_dir={run_dir}", f"convert.output={target}", verb="convert")
    return (target / "model.safetensors").read_bytes()


def test_killed_and_restarted_equals_uninterrupted(small_dataset, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [*DROPOUT, f"data.root={small_dataset}", f"run_dir={run_dir}"]
    for stage, lines in KILLS:
        signal_after(arguments, run_dir / stage / "metrics.jsonl", lines, signal.SIGKILL)
        assert not (run_dir / "summary.json").exists()
    summary = run(*arguments)
    for stage in ("sft", "sft_continued", "rl"):
        ours, expected = ((base / stage / "metrics.jsonl").read_bytes() for base in (run_dir, uninterrupted))
        assert ours == expected, stage
    assert len(metrics(run_dir, "rl")) == 4
    # dropout belongs to SFT: before its first update the policy equals the one that made the rollout
    assert abs(metrics(run_dir, "rl")[0]["rl/ratio_mean"] - 1.0) < 1e-4
    for stage in ("sft", "rl"):
        ours = exported(run_dir, stage, tmp_path / f"killed_{stage}")
        assert ours == exported(uninterrupted, stage, tmp_path / f"whole_{stage}"), stage
    assert exported(run_dir, "rl", tmp_path / "rl") != exported(run_dir, "sft", tmp_path / "sft")
    assert summary["invalid_rate"] == 0.0


def test_another_recipe_in_the_same_run_directory_is_refused(small_dataset, uninterrupted):
    arguments = [*DROPOUT, f"data.root={small_dataset}", f"run_dir={uninterrupted}", "rl.lr=2e-3"]
    done = called(*arguments)
    assert done.returncode == 2
    assert "rl.lr: 0.001 -> 0.002" in done.stderr


def test_signals_end_the_step_save_and_exit_75(small_dataset, uninterrupted, tmp_path):
    arguments = [*DROPOUT, f"data.root={small_dataset}", f"run_dir={tmp_path}", "trainer.save_interval=1000"]
    for stage, number in (("sft", signal.SIGTERM), ("rl", signal.SIGUSR1)):
        log = tmp_path / stage / "metrics.jsonl"
        code, words = signal_after(arguments, log, 2, number)
        assert code == 75, words
        assert f"{number.name}: {stage} saved step" in words
        newest = max(int(path.name[5:]) for path in (tmp_path / stage / "checkpoints").glob("step_*"))
        assert newest == json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"]
    run(*arguments)
    for stage in ("sft", "rl"):
        ours, expected = ((base / stage / "metrics.jsonl").read_bytes() for base in (tmp_path, uninterrupted))
        assert ours == expected, stage


def test_out_of_time_saves_exits_75_and_continues(small_dataset, uninterrupted, tmp_path):
    arguments = [*DROPOUT, f"data.root={small_dataset}", f"run_dir={tmp_path}"]
    stopped = called(*arguments, "trainer.max_time=00:00:00:00")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    run(*arguments)
    assert (tmp_path / "rl" / "metrics.jsonl").read_bytes() == (uninterrupted / "rl" / "metrics.jsonl").read_bytes()


def test_checkpoints_by_time_change_nothing_that_is_computed(small_dataset, uninterrupted, tmp_path):
    """Here one after every step, also while a thread writes the one before."""
    often = [
        "trainer.save_interval=1000",
        "trainer.save_minutes=1e-6",
        "trainer.keep_last=100",
        "trainer.async_save=true",
    ]
    run(*DROPOUT, f"data.root={small_dataset}", f"run_dir={tmp_path}", *often)
    assert sorted(path.name for path in (tmp_path / "rl" / "checkpoints").iterdir()) == [
        f"step_{n}" for n in range(1, 5)
    ]
    for stage in ("sft", "sft_continued", "rl"):
        ours, expected = ((base / stage / "metrics.jsonl").read_bytes() for base in (tmp_path, uninterrupted))
        assert ours == expected, stage


@pytest.mark.full
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_rank_killed_while_it_writes_its_pieces(small_dataset, tmp_path, monkeypatch, background):
    """Rank 1 of two data-parallel ranks dies in the middle of its file: the checkpoint before that one counts."""
    short = [*SMALL, "sft.enabled=false", "rl.init=base", "trainer.devices=2", f"trainer.async_save={background}"]
    whole, broken = ([*short, f"data.root={small_dataset}", f"run_dir={tmp_path / name}"] for name in ("a", "b"))
    run(*whole)
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "save.mid_shard=kill@3/1")
        assert called(*broken).returncode != 0
    left = sorted(path.name for path in (tmp_path / "b" / "rl" / "checkpoints").iterdir())
    assert ".step_3.tmp" in left
    assert "step_2" in left
    assert "step_3" not in left
    run(*broken)
    ours, expected = ((tmp_path / name / "rl" / "metrics.jsonl").read_bytes() for name in ("b", "a"))
    assert ours == expected
