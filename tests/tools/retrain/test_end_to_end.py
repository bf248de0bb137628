"""Nightly runs on a generated review log that grows: published, refused, killed and continued."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo.cli import main
from tests import forked
from tests.tools.retrain.test_webhook import receiver
from tests.train.runs import environment

REFUSED = 3
FIRST, SECOND, THIRD, FOURTH = "2018-03-31", "2018-05-31", "2018-07-31", "2018-09-30"
#: 60 items: even a nano model learns in some dozen steps which of them are popular.
NIGHT = (
    "data.dataset=synthetic prepare.synthetic_items=60 prepare.synthetic_users=500 data.bpe_vocab_size=320 "
    "data.max_prompt_tokens=120 data.max_history=2 data.train_limit=600 data.eval_limit=100 model.backbone=nano "
    "sft.epochs=2 sft.global_batch_size=32 sft.micro_batch_tokens=4096 sft.warmup=5 sft.lr=1e-2 sft.loss_space=trie "
    "rl.prompts_per_step=8 rl.group_size=4 rl.max_steps=4 rl.micro_batch_tokens=2048 compare.sft_continued=false "
    "eval.beams=6 eval.ks=[1,3] eval.splits=[valid] retrain.metrics=[ndcg@3,recall@3] retrain.tail_k=3 "
    "trainer.save_interval=2 trainer.threads=1"
).split()
#: A first run that learns nothing, and one that unlearns everything.
IDLE, RUINED = ("sft.lr=1e-9", "rl.lr=1e-9"), ("sft.lr=1.0", "sft.warmup=0", "rl.lr=1.0")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("production") / "root"


def nightly_run(
    root: Path, date: str, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the verb, in this process."""
    capsys.readouterr()
    code = main(["retrain", f"retrain.root={root}", f"retrain.date={date}", *NIGHT, *overrides])
    return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def gate(root: Path, date: str) -> dict[str, Any]:
    return dict(json.loads((root / "runs" / date / "gate.json").read_text(encoding="utf-8")))


def published(root: Path) -> str:
    return (root / "latest").resolve().name


def rows(root: Path, date: str) -> int:
    manifest = json.loads((root / "runs" / date / "data" / "manifest.json").read_text(encoding="utf-8"))
    return int(manifest["statistics"]["rows"]["train"])


def test_nightly_runs_are_published_refused_and_continued(root, capsys):
    """One story in order: every nightly run begins from what the one before it left."""
    code, result = nightly_run(root, FIRST, capsys, *IDLE)
    assert (code, result["published"], published(root)) == (0, True, FIRST)
    assert gate(root, FIRST)["verdicts"][0]["published"] is None
    assert {"config.json", "model.safetensors", "tokenizer.json", "gate.json"} <= set(os.listdir(root / "latest"))

    code, result = nightly_run(root, SECOND, capsys, "retrain.margin=1.0")
    assert (code, published(root)) == (0, SECOND), result
    assert rows(root, SECOND) > rows(root, FIRST)
    decision = gate(root, SECOND)
    assert (decision["passed"], decision["against"], decision["rows"]) == (True, FIRST, 100)
    for verdict in decision["verdicts"]:
        assert verdict["candidate"]["low"] <= verdict["candidate"]["mean"] <= verdict["candidate"]["high"]
        assert verdict["difference"]["mean"] == pytest.approx(
            verdict["candidate"]["mean"] - verdict["published"]["mean"], abs=1e-9
        )
    began = json.loads((root / "runs" / SECOND / "night.json").read_text(encoding="utf-8"))
    assert Path(began["start"]) == (root / "versions" / FIRST).resolve()

    before = (root / "latest" / "model.safetensors").read_bytes()
    with receiver() as (url, bodies):
        code, result = nightly_run(root, THIRD, capsys, *RUINED, f"retrain.webhook={url}")
    assert (code, result["published"], published(root)) == (REFUSED, False, SECOND)
    assert [(body["event"], body["reasons"]) for body in bodies] == [("refused", result["reasons"])]
    assert result["reasons"] == gate(root, THIRD)["reasons"] != []
    assert not (root / "versions" / THIRD).exists()
    assert (root / "latest" / "model.safetensors").read_bytes() == before


def test_the_export_that_the_gate_saw_is_as_good_as_the_checkpoint(root):
    """float32 all the way: the same ranks from the export as from the checkpoint it was made of."""
    run_dir = root / "runs" / SECOND
    exported, trained = (run_dir / folder / "eval" / "valid.per_user.parquet" for folder in ("gate/candidate", "rl"))
    assert exported.read_bytes() == trained.read_bytes()


def test_the_same_date_again_does_nothing(root, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder in place of a server
    untouched = {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("*") if path.is_file()}
    assert nightly_run(root, SECOND, capsys)[0] == 0
    registry = ("sinks.mlflow_model=shop", f"sinks.mlflow_uri={(root.parent / 'mlflow').as_uri()}")
    code, result = nightly_run(root, SECOND, capsys, *registry)  # registers what is published
    assert (code, result["published"], result["registered"]) == (0, True, "shop/1")
    assert {path: path.stat().st_mtime_ns for path in (root / "runs").rglob("*") if path.is_file()} == untouched
    assert main(["retrain", f"retrain.root={root}", f"retrain.date={FIRST}", *NIGHT]) == 2
    assert "older than the published version" in capsys.readouterr().err


def test_a_refused_nightly_run_can_be_judged_again_without_training(root, capsys):
    begun = time.monotonic()
    metrics = root / "runs" / THIRD / "rl" / "metrics.jsonl"
    stamp = metrics.stat().st_mtime_ns
    code, result = nightly_run(root, THIRD, capsys, *RUINED, "retrain.webhook=http://127.0.0.1:9/nobody")
    assert (code, metrics.stat().st_mtime_ns) == (REFUSED, stamp)
    assert result["reasons"]
    assert time.monotonic() - begun < 60


def test_a_nightly_run_that_is_killed_continues_with_the_same_command(root, tmp_path):
    """SIGKILL inside RL; until the end the published model stays what it was."""
    words = [f"retrain.root={root}", f"retrain.date={FOURTH}", *NIGHT, "retrain.margin=1.0"]
    log = root / "runs" / FOURTH / "rl" / "metrics.jsonl"
    process = forked.start(forked.verb, ["retrain", *words], environment(), tmp_path / "screen")
    give_up = time.monotonic() + 400
    while not log.is_file() and process.exitcode is None and time.monotonic() < give_up:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert published(root) == SECOND
    assert not (root / "runs" / FOURTH / "export").exists()
    assert main(["retrain", *words]) == 0
    assert published(root) == FOURTH
    steps = [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("retrain.root=''", ["retrain.root is empty"]),
        ("retrain.metrics=[ndcg@10]", ["ndcg@10", "recall@3"]),
        ("eval.splits=[test]", ["eval.splits=['test']", "valid"]),
        ("retrain.date=tomorrow", ["retrain.date=tomorrow", "YYYY-MM-DD"]),
        ("run_dir=x", ["run_dir"]),
        ("retrain.webhook=file:///tmp/x", ["retrain.webhook=file:///tmp/x", "http"]),
    ],
)
def test_mistakes_are_told_before_anything_starts(override, parts, tmp_path, capsys):
    assert main(["retrain", f"retrain.root={tmp_path}", "retrain.date=2018-01-01", *NIGHT, override]) == 2
    told = capsys.readouterr().err
    assert all(part in told for part in parts), told
    assert list(tmp_path.iterdir()) == []
