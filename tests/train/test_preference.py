"""Runs with a preference stage: every objective and source, layouts equal one process, exact resume, errors."""

import json
import math
import shutil

import pytest

from tests.train.runs import SMALL, assert_same_metrics, called, metrics, run

#: SFT is what test_sft.py and test_layouts.py test.
STAGE = (
    "rl.enabled=false sft.epochs=1 preference.enabled=true preference.max_steps=4 preference.lr=1e-3 "
    "preference.global_batch_size=32 preference.micro_batch_tokens=1024 preference.share_group=8 eval.splits=[valid]"
).split()
NAPO = ["preference.algorithm=napo", "preference.negatives=self_play", "preference.search_every=3"]


@pytest.fixture(scope="module")
def aux(small_dataset, tmp_path_factory):
    """A finished SASRec of the same catalog."""
    directory = tmp_path_factory.mktemp("aux")
    run(*SMALL, "baseline.model=sasrec", "baseline.epochs=3", f"data.root={small_dataset}", f"run_dir={directory}")
    return directory / "sasrec"


@pytest.fixture(scope="module")
def napo(small_dataset, aux, tmp_path_factory):
    """One process, never interrupted, with all its checkpoints; the margin moves and items are searched twice."""
    directory = tmp_path_factory.mktemp("napo")
    run(*arguments(small_dataset, directory, *NAPO, f"preference.aux={aux}", "trainer.keep_last=9"))
    return directory


def arguments(dataset, directory, *more):
    return [*SMALL, *STAGE, f"data.root={dataset}", f"run_dir={directory}", *more]


def test_the_margin_and_the_shared_items_are_logged(napo):
    lines = metrics(napo, "preference")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["preference/gamma"] == 1.0
    assert len({line["preference/gamma"] for line in lines}) == 4
    mean = lines[0]["preference/confidence"]
    for line in lines[1:]:
        assert line["preference/gamma"] == pytest.approx(1 + 0.3 * (line["preference/confidence"] - mean))
        mean = 0.9 * mean + 0.1 * line["preference/confidence"]
        assert line["preference/confidence_baseline"] == pytest.approx(mean)
    assert all(10 < line["preference/negatives_per_row"] <= 15 for line in lines)  # 3 own and those of 4 rows
    timings = [json.loads(line) for line in (napo / "preference" / "timings.jsonl").read_text().splitlines()]
    assert all(line["memory_gib"] > 0 and line["rows/update"] > 0 for line in timings)
    assert ["rows/generate" in line for line in timings] == [True, False, False, True]
    report = (napo / "report.html").read_text(encoding="utf-8")
    assert "Preference optimisation" in report
    assert "Reward margin of a pair" in report


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("devices", "layout"),
    [(4, "model.tensor_model_parallel_size=2"), (2, "model.pipeline_model_parallel_size=2")],
    ids=["tp2_dp2", "pp2"],
)
def test_losses_equal_one_process(devices, layout, small_dataset, aux, napo, tmp_path):
    run(*arguments(small_dataset, tmp_path, *NAPO, f"preference.aux={aux}", layout, f"trainer.devices={devices}"))
    ranks = json.loads((tmp_path / "layout.json").read_text())
    assert len(ranks) == devices
    assert_same_metrics(tmp_path, napo, "preference", atol=1e-5)


@pytest.mark.parametrize("step", [1, 3])
def test_resume_is_byte_equal(step, napo, small_dataset, aux, tmp_path):
    """From between two searches (1: their items lie in the checkpoint) and from before one (3)."""
    interrupted = tmp_path / "run"
    shutil.copytree(napo, interrupted)
    for path in (interrupted / "preference" / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (interrupted / "preference" / "done.json").unlink()
    shutil.rmtree(interrupted / "preference" / "eval")
    (interrupted / "summary.json").unlink()
    state = json.loads((interrupted / "preference" / "checkpoints" / f"step_{step}" / "state.json").read_text())
    facts = state["state"]["progress"]["facts"]
    assert "confidence_baseline" in facts
    assert ("items" in facts) == (step == 1)
    run(*arguments(small_dataset, interrupted, *NAPO, f"preference.aux={aux}", "trainer.keep_last=9"))
    ours, expected = ((folder / "preference" / "metrics.jsonl").read_bytes() for folder in (interrupted, napo))
    assert ours == expected
    weights = sorted(path.relative_to(napo) for path in (napo / "preference/checkpoints/step_4").glob("*.distcp"))
    assert weights
    for name in weights:
        assert (interrupted / name).read_bytes() == (napo / name).read_bytes(), name


@pytest.mark.parametrize(
    "words",
    [
        "preference.algorithm=dpo preference.negatives=random reference.mode=copy",
        "preference.algorithm=sdpo preference.negatives=beam preference.search_every=1 reference.mode=swap "
        "reference.refresh=every reference.refresh_steps=2",
        "preference.algorithm=alpha_dpo preference.negatives=candidates",
        "preference.algorithm=rosepo preference.policy_space=vocab preference.init=base sft.enabled=false",
        "preference.algorithm=simpo preference.length_norm=branching preference.rows=fresh reference.mode=off "
        "trainer.val_check_interval=2",
    ],
    ids=lambda words: words.split()[0].split("=")[1],
)
def test_every_objective_runs(words, small_dataset, tmp_path):
    summary = run(*arguments(small_dataset, tmp_path, *words.split(), "preference.max_steps=2"))
    assert summary["final_stage"] == "preference"
    lines = [line for line in metrics(tmp_path, "preference") if "preference/loss" in line]
    assert len(lines) == 2
    assert all(math.isfinite(line["preference/loss"]) and line["grad_norm"] > 1e-4 for line in lines)
    if "dpo" in words.split()[0]:  # the policy is its own reference before the first step
        assert abs(lines[0]["preference/reward_margin"]) < (1e-4 if "alpha" not in words else 10)
    if words.startswith("preference.algorithm=dpo"):
        assert lines[0]["preference/loss"] == pytest.approx(math.log(2), abs=1e-5)
    if words.startswith("preference.algorithm=sdpo"):
        assert lines[0]["preference/loss"] == pytest.approx(math.log(1 + 3), abs=1e-4)


def test_rl_can_start_from_the_preference_stage(small_dataset, tmp_path):
    words = "rl.enabled=true rl.init=preference rl.max_steps=1 preference.max_steps=1 preference.algorithm=dpo"
    done = called(*arguments(small_dataset, tmp_path, *words.split()))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert [stage for stage in summary if isinstance(summary[stage], dict)] == ["sft", "preference", "rl"]
    assert "rl - preference (paired)" in done.stderr


def test_a_dry_run_counts_its_steps_and_checks_the_auxiliary_model(small_dataset, aux, tmp_path):
    words = ["preference.algorithm=napo", "preference.max_steps=0", f"preference.aux={aux}", "--dry-run"]
    result = run(*arguments(small_dataset, tmp_path, *words))
    assert result["preference_steps"] == 6  # 192 rows in batches of 32
    assert list(result["stages"]) == ["sft", "preference"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("preference.algorithm=napo preference.aux=nowhere", "preference.aux=nowhere: nowhere is not a finished"),
        ("preference.num_negatives=1000", "preference.num_negatives=1000, but the catalog has"),
        ("preference.negatives=candidates preference.num_candidates=1000", "preference.num_candidates=1000 leaves"),
    ],
)
def test_unusable_settings_are_named_before_anything_is_trained(words, message, small_dataset, tmp_path):
    done = called(*arguments(small_dataset, tmp_path, *words.split()))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "sft").exists()
