"""What a later stage would refuse ends a run, and a dry run, before the first one starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.run.world import World
from tawin_nemo.train import requirements
from tawin_nemo.train.plan import Plan
from tawin_nemo.util.errors import ConfigError
from tests.train.runs import SMALL, called


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.group_size=400"], "rl.group_size=400 asks for more beams than the catalog has"),
        (["rollout.width=4000"], "rollout.width=4000 asks for more beams than the catalog has"),
        (["rl.reward=collaborative", "rl.reward_source=nowhere"], "nowhere"),
        (["rl.reward=semantic", "rl.reward_source=nowhere.npy"], "nowhere.npy"),
        (["model.lora.rank=20"], "model.lora.rank=20 is more than the smaller side of k_proj, which is 16"),
        (["start=nowhere"], "start=nowhere is neither a finished stage"),
    ],
)
def test_a_dry_run_refuses_what_a_later_stage_would(
    overrides: list[str], message: str, small_dataset: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}", *overrides]
    done = called(*words, "--dry-run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_all_of_it_is_listed_and_nothing_is_trained(small_dataset: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path / 'run'}"]
    done = called(*words, "rl.group_size=400", "rl.reward=collaborative", "rl.reward_source=nowhere")
    assert done.returncode == 2
    assert "2 things would end this run:" in done.stderr
    assert not (tmp_path / "run" / "sft").exists()


def test_a_stage_that_is_done_needs_nothing_any_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a finished stage started from may be gone when the same command is given again."""
    recipe = load_recipe(None, [f"run_dir={tmp_path}", "start=gone", "rl.enabled=false"])
    world = cast(World, SimpleNamespace(recipe=recipe, run_dir=tmp_path))
    monkeypatch.setattr(requirements, "plans", lambda _: iter([Plan("sft", None, np.arange(3), "sft")]))
    with pytest.raises(ConfigError, match="start=gone"):
        requirements.check_requirements(world)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "done.json").write_text("{}")
    requirements.check_requirements(world)
