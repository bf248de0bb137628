"""evaluate, generate, convert and a repeated train on a finished run, as a user calls them."""

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tawin_nemo.commands.generate import items_of
from tawin_nemo.util.errors import ConfigError
from tests.train.runs import SMALL, called, environment, run


def test_evaluate_repeats_the_numbers_of_the_run(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    result = run(f"checkpoint={finished_run / 'sft'}", verb="evaluate")
    assert {key: result["test"][key] for key in summary["sft"]} == summary["sft"]
    assert result["test"]["rows"] == 24
    assert result["test"]["invalid_rate"] == 0.0
    for name, (low, high) in result["test"]["intervals"].items():
        assert low <= result["test"][name] <= high


def test_generate_answers_with_ranked_catalog_items(finished_run):
    result = run(f"checkpoint={finished_run / 'rl'}", "generate.history=[3,5]", "generate.n=4", verb="generate")
    (answer,) = result["recommendations"]
    assert len(answer["history"]) == 2
    assert len(answer["items"]) == 4
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert all(item["title"] and item["external_id"] for item in answer["items"])


def test_a_history_may_be_named_by_external_ids_or_numbers():
    ids = ["B01", "B02", "1", "B04"]
    assert items_of(["B02", "3", "#0"], ids) == [1, 3, 0]
    assert items_of(["1", "#1"], ids) == [2, 1]
    with pytest.raises(ConfigError, match="names B99, #7"):
        items_of(["B99", "0", "#7"], ids)


def test_generate_names_an_unknown_item(finished_run):
    done = called(f"checkpoint={finished_run / 'rl'}", "generate.history=[3,99999]", verb="generate")
    assert done.returncode == 2
    assert "99999" in done.stderr
    assert "Traceback" not in done.stderr


def test_convert_writes_what_transformers_loads(finished_run, tmp_path):
    run(f"checkpoint={finished_run / 'rl'}", f"convert.output={tmp_path / 'hf'}", verb="convert")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) <= model.config.vocab_size
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("<|item|>")])).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_a_finished_run_is_not_trained_again(finished_run, small_dataset):
    before = (finished_run / "rl" / "metrics.jsonl").read_bytes()
    start = time.time()
    summary = run(*SMALL, f"data.root={small_dataset}", f"run_dir={finished_run}")
    assert (finished_run / "rl" / "metrics.jsonl").read_bytes() == before
    assert all(path.stat().st_mtime < start for path in (finished_run / "rl" / "checkpoints").iterdir())
    assert summary["invalid_rate"] == 0.0


def test_dry_run_says_what_would_happen(small_dataset, tmp_path):
    result = run(*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", "--dry-run")
    assert result["stages"] == {"sft": 154, "sft_continued": 38, "rl": 38}
    assert result["rl_steps"] == 4
    assert not (tmp_path / "sft").exists()


@pytest.mark.distributed
def test_another_number_of_processes_is_refused(small_dataset, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tawin_nemo"]
    arguments = [*launcher, "train", *SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode != 0
    assert "trainer.devices=1 = 1 processes, but the launcher started 2" in done.stderr


@pytest.mark.slow
def test_tensorboard_through_nemos_exp_manager(small_dataset, tmp_path):
    run(
        *SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", "rl.enabled=false", "sft.rows=all", "sft.epochs=1",
        "exp_manager.create_tensorboard_logger=true",
    )  # fmt: skip
    (events,) = (tmp_path / "exp_manager").rglob("events.out.tfevents*")
    assert b"sft/train/loss" in events.read_bytes()


def test_nemo_refuses_an_unknown_exp_manager_key(small_dataset, tmp_path):
    done = called(*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", "exp_manager.create_tensorbored=1")
    assert done.returncode == 2
    assert "create_tensorbored" in done.stderr
