"""Verbs read the checkpoint, tokenizer, catalog and data of a run, from wherever they are started, or say why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tawin_nemo.config.load import load_recipe
from tawin_nemo.run.trained import check_catalog, check_tokenizer, identity_of, newest_stage, trained_model
from tawin_nemo.util.errors import ConfigError
from tests.train.runs import called, command, environment, run


def test_evaluate_without_a_checkpoint_takes_the_newest_stage_and_says_so(finished_run: Path):
    done = called("--recipe", str(finished_run / "recipe.yaml"), verb="evaluate")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    summary = json.loads((finished_run / "summary.json").read_text())
    assert result["checkpoint"] == str(finished_run / "rl")
    assert f"{finished_run / 'rl'}, the newest finished stage" in done.stderr
    assert {key: result["test"][key] for key in summary["rl"]} == summary["rl"]


@pytest.mark.parametrize("verb", ["evaluate", "generate", "convert", "serve"])
def test_without_any_weights_a_verb_ends_with_2(verb: str, small_dataset: Path, tmp_path: Path):
    words = [f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}", f"convert.output={tmp_path / 'out'}"]
    done = called(*words, verb=verb)
    assert done.returncode == 2
    assert "has no finished stage (nothing was trained there)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_baseline_is_not_taken_for_a_language_model(tmp_path: Path):
    (tmp_path / "sasrec").mkdir()
    (tmp_path / "sasrec" / "done.json").write_text('{"chosen_step": 1}')
    with pytest.raises(ConfigError, match=r"baseline\.model=sasrec trains a classic recommender"):
        trained_model(load_recipe(None, [f"run_dir={tmp_path}", "baseline.model=sasrec"]))


def test_an_unfinished_stage_is_named(tmp_path: Path):
    (tmp_path / "run" / "sft" / "checkpoints" / "step_3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not finished: sft: 1 checkpoints"):
        trained_model(load_recipe(None, [f"run_dir={tmp_path / 'run'}"]))


def test_a_checkpoint_from_another_folder_uses_its_own_data_and_tokenizer(finished_run: Path, tmp_path: Path):
    """The very numbers of the run, though nothing of it lies in the current folder; nothing is prepared or written."""
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    recipe = OmegaConf.load(finished_run / "recipe.yaml")
    recipe.run_dir = ""
    OmegaConf.save(recipe, tmp_path / "recipe.yaml")
    words = command("--recipe", "recipe.yaml", f"checkpoint={finished_run / 'sft'}", verb="evaluate")
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result, summary = json.loads(done.stdout.splitlines()[-1]), json.loads((finished_run / "summary.json").read_text())
    assert {key: result["test"][key] for key in summary["sft"]} == summary["sft"]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}


def test_other_prompts_than_those_of_training_are_an_error(finished_run: Path):
    done = called(f"checkpoint={finished_run / 'rl'}", "data.max_history=3", verb="evaluate")
    assert done.returncode == 2
    assert "data.max_history: " in done.stderr
    assert "-> 3" in done.stderr


def test_fewer_rows_are_no_other_model(finished_run: Path):
    assert run(f"checkpoint={finished_run / 'sft'}", "data.eval_limit=5", verb="evaluate")["test"]["rows"] == 5


def test_a_step_without_its_run_is_compared_by_fingerprint(finished_run: Path, tmp_path: Path):
    step = next((finished_run / "sft" / "checkpoints").glob("step_*"))
    shutil.copytree(step, tmp_path / step.name)
    known = identity_of(tmp_path / step.name)
    assert known["tokenizer"]
    assert known["catalog"]
    check_tokenizer(tmp_path / step.name, known["tokenizer"])
    check_catalog(tmp_path / step.name, known["catalog"])
    with pytest.raises(ConfigError, match="trained with the tokenizer"):
        check_tokenizer(tmp_path / step.name, "0" * 64)
    with pytest.raises(ConfigError, match="trained with the catalog"):
        check_catalog(tmp_path / step.name, "0" * 64)


def test_the_newest_stage_is_the_one_that_the_summary_names_last(tmp_path: Path):
    for at, name in enumerate(("rl", "sft")):  # sft was written last, for example by a copy
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text("{}")
        os.utime(tmp_path / name / "done.json", (at, at))
    assert newest_stage(tmp_path) == tmp_path / "sft"
    (tmp_path / "summary.json").write_text('{"final_stage": "rl"}')
    assert newest_stage(tmp_path) == tmp_path / "rl"
    assert newest_stage(tmp_path / "empty") is None
