"""Runs whose rollouts have ranks of their own, through the command line: stopped anywhere they continue bit for bit,
and a rollout rank that dies ends the job."""

import json

import pytest

from tests.crash_matrix.attempts import RECIPE, difference, fingerprint, launched
from tests.crash_matrix.cases import RANK_LIMIT
from tests.train.runs import SMALL, assert_same_metrics, called, metrics, run

APART = ("trainer.devices=2", "rollout.placement=separate", "rollout.devices=1")
#: Over the recipe of the crash matrix. The nano model finds no target in so few steps; the SFT term moves its weights.
AHEAD = (
    *APART, "rollout.ahead=1", "rl.ensure_target=off", "rl.sft_weight=0.3", "rl.max_steps=6", "rl.init=base",
    "sft.enabled=false", "trainer.save_interval=2",
)  # fmt: skip


@pytest.mark.distributed
def test_on_policy_the_run_equals_one_process(small_dataset, finished_run, tmp_path):
    run(*SMALL, *APART, "trainer.async_save=true", f"data.root={small_dataset}", f"run_dir={tmp_path}")
    stages = ("sft", "sft_continued", "rl")
    assert_same_metrics(tmp_path, finished_run, *stages)
    for stage in stages:
        path = f"{stage}/eval/test.per_user.parquet"
        assert (tmp_path / path).read_bytes() == (finished_run / path).read_bytes()
    layout = json.loads((tmp_path / "layout.json").read_text())
    assert [(rank["rank"], rank.get("role")) for rank in layout] == [(0, None), (1, "rollout")]
    assert "attempt 1, rank 1 of 2" in (tmp_path / "logs" / "attempt_1" / "rank_1.log").read_text()


@pytest.mark.distributed
@pytest.mark.timeout(1800)  # two starts of the launcher: minutes each on a busy machine
def test_ahead_killed_and_stopped_runs_equal_one_that_was_not(small_dataset, tmp_path):
    """SIGKILL between two checkpoints, then SIGTERM after a step that would not have been saved."""
    whole, stopped = ([*AHEAD, f"data.root={small_dataset}", f"run_dir={tmp_path / name}"] for name in "ab")
    run(*RECIPE, *whole)
    lines = metrics(tmp_path / "a", "rl")
    assert [line["rl/staleness"] for line in lines] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert max(line["rl/mismatch_kl"] for line in lines[1:]) > 100 * abs(lines[0]["rl/mismatch_kl"])
    killed = launched(stopped, rules="rl.after_rollout=kill@4/0")
    assert "rank 0 was killed by SIGKILL" in killed.last_words
    assert len(metrics(tmp_path / "b", "rl")) == 3
    asked = launched(stopped, term_at="rl continues after step 2")
    assert asked.code == 75, asked.last_words
    assert len(metrics(tmp_path / "b", "rl")) == 3
    last = called(*RECIPE, *stopped)
    assert (last.returncode, "rl continues after step 3" in last.stderr) == (0, True), last.stderr[-3000:]
    assert difference(tmp_path / "b", fingerprint(tmp_path / "a")) == ""


@pytest.mark.distributed
def test_a_rollout_rank_that_dies_ends_the_job(small_dataset, tmp_path):
    overrides = [*AHEAD, f"data.root={small_dataset}", f"run_dir={tmp_path}"]
    raised = launched(overrides, rules="rollout_rank.asked=raise@2/1")
    assert (raised.code, 0 < raised.seconds_after < RANK_LIMIT) == (1, True), raised.last_words
    assert "RuntimeError: failpoint rollout_rank.asked" in raised.last_words
    assert raised.last_words.splitlines()[-1].startswith("tawin-nemo: rank 1 ended with 1")
    killed = launched(overrides, rules="rollout_rank.asked=kill@2/1")
    assert (killed.code, 0 < killed.seconds_after < RANK_LIMIT) == (1, True), killed.last_words
    assert killed.last_words.splitlines()[-1].startswith("tawin-nemo: rank 1 was killed by SIGKILL")
    log = (tmp_path / "logs" / "attempt_1" / "rank_1.log").read_text(encoding="utf-8")
    assert "RuntimeError: failpoint rollout_rank.asked" in log
