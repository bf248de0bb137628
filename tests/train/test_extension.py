"""A run that has ended gets more steps under a longer recipe, with its optimizer's state."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from tawin_nemo.config.load import load_recipe, to_yaml
from tawin_nemo.run.world import World
from tawin_nemo.train import extension
from tawin_nemo.train.plan import Plan
from tawin_nemo.util.errors import ConfigError
from tests.train.runs import SMALL, called, run


def test_a_continued_run_equals_one_that_was_long_from_the_start(small_dataset: Path, tmp_path: Path) -> None:
    def words(name: str, steps: int) -> list[str]:
        given = [f"data.root={small_dataset}", f"run_dir={tmp_path / name}", f"rl.max_steps={steps}"]
        return [*SMALL, *given, "rl.schedule=constant", "compare.sft_continued=false", "eval.splits=[test]"]

    run(*words("grown", 2))
    announced = run(*words("grown", 4), "--dry-run")
    assert announced["continues"] == {"rl": "rl.max_steps: 2 -> 4"}
    grown = run(*words("grown", 4))
    straight = run(*words("straight", 4))
    for file in ("metrics.jsonl", "eval/test.json"):
        assert (tmp_path / "grown/rl" / file).read_bytes() == (tmp_path / "straight/rl" / file).read_bytes()
    assert grown["rl"] == straight["rl"]
    assert (tmp_path / "grown/rl/eval.step_2/test.json").is_file()
    assert "max_steps: 4" in (tmp_path / "grown/recipe.yaml").read_text()

    shorter = called(*words("grown", 3))
    assert shorter.returncode == 2, shorter.stderr
    assert "cannot become shorter" in shorter.stderr
    behind = called(*words("grown", 4), "sft.epochs=3")
    assert behind.returncode == 2, behind.stderr
    assert "rl of" in behind.stderr
    assert "started from it" in behind.stderr


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A finished SFT of 4 epochs with nothing behind it, under a recipe that asks for 6."""
    old = load_recipe(None, [f"run_dir={tmp_path}", "sft.epochs=4", "rl.enabled=false"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(old))
    stage = tmp_path / "sft"
    (stage / "checkpoints" / "step_20").mkdir(parents=True)
    (stage / "eval").mkdir()
    (stage / "done.json").write_text('{"step": 20, "chosen_step": 10}')
    (stage / "checkpoints" / "step_20" / "state.json").write_text(json.dumps({"progress": {"bad_checks": 0}}))
    new = load_recipe(None, [f"run_dir={tmp_path}", "sft.epochs=6", "rl.enabled=false"])
    monkeypatch.setattr(extension, "plans", lambda _: iter([Plan("sft", None, np.arange(3), "sft")]))
    return cast(World, SimpleNamespace(recipe=new, run_dir=tmp_path))


def test_an_interrupted_extension_is_completed(finished: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored recipe changes last, so a kill before that leaves everything to be found again."""
    with monkeypatch.context() as patched:
        patched.setattr(extension, "atomic_path", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extension.extend_finished(finished)
    assert "epochs: 4" in (finished.run_dir / "recipe.yaml").read_text()
    extension.extend_finished(finished)
    assert "epochs: 6" in (finished.run_dir / "recipe.yaml").read_text()
    assert not (finished.run_dir / "sft" / "done.json").exists()
    assert (finished.run_dir / "sft" / "eval.step_20").is_dir()


def test_sft_that_stopped_early_stays_as_it_is(finished: World) -> None:
    patience = finished.recipe.sft.patience
    state = finished.run_dir / "sft" / "checkpoints" / "step_20" / "state.json"
    state.write_text(json.dumps({"progress": {"bad_checks": patience}}))
    extension.extend_finished(finished)
    assert (finished.run_dir / "sft" / "done.json").is_file()


def test_a_stage_that_others_started_from_is_not_continued(finished: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished.run_dir / "rl").mkdir()
    stages = [Plan("sft", None, np.arange(3), "sft"), Plan("rl", "sft", np.arange(3), "rl")]
    monkeypatch.setattr(extension, "plans", lambda _: iter(stages))
    with pytest.raises(ConfigError, match=r"sft.epochs: 4 -> 6 would continue stage sft, but rl of"):
        extension.extend_finished(finished)
    assert (finished.run_dir / "sft" / "done.json").is_file()
