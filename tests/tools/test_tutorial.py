"""The tutorial's scripts run as they stand, on a small model in Hugging Face format."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.pages.test_examples import folder, path_scores  # noqa: F401 (folder: a fixture)
from tests.train.runs import importable

TUTORIAL = REPOSITORY / "recipes" / "tutorial"


def lines(script: str, model: Path, workplace: Path) -> list[str]:
    words = [sys.executable, str(TUTORIAL / script), str(model)]
    done = subprocess.run(words, env=importable(), cwd=workplace, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout.strip().splitlines()


@pytest.mark.slow
def test_constrained_search_on_a_hugging_face_model(folder: Path, tmp_path: Path):  # noqa: F811
    """The order and scores of all titles by full forward passes of transformers."""
    shown = lines("search_hf.py", folder, tmp_path)
    titles = ["Steel ruler 30 cm", "Steel ruler 15 cm", "Digital caliper", "Nitrile gloves", "Tape measure"]
    assert len(shown) == 2
    for line, item in zip(shown, ("Tape measure", "Nitrile gloves"), strict=True):
        expected = path_scores(folder, titles, f"Bought: {item}. Next: ")
        found = [part.rstrip(")").rsplit(" (", 1) for part in line.split(", ")]
        assert [title for title, _ in found] == sorted(titles, key=lambda title: -expected[title])[:3]
        assert all(math.isclose(float(score), expected[title], abs_tol=2e-3) for title, score in found)


@pytest.mark.slow
def test_rl_steps_in_forty_lines(folder: Path, tmp_path: Path):  # noqa: F811
    """The step has at most 40 lines, and after some of them both targets stand first."""
    source = (TUTORIAL / "rl_step.py").read_text(encoding="utf-8")
    step = source[source.index("def rl_step") :].split("\n\n\n")[0]
    assert len(step.splitlines()) <= 40
    shown = lines("rl_step.py", folder, tmp_path)
    assert len(shown) == 8
    assert shown[-1] == "step 7: ranks of the targets [0, 0]"
    assert shown[0] != "step 0: ranks of the targets [0, 0]"


@pytest.mark.slow
def test_trl_with_our_search(folder: Path, tmp_path: Path):  # noqa: F811
    pytest.importorskip("trl", reason="TRL is not installed; tests/run.sh installs it")
    shown = [line for line in lines("trl_grpo.py", folder, tmp_path) if line.startswith("step")]  # TRL prints too
    assert [line.split(":")[0] for line in shown] == [f"step {n}" for n in range(1, 6)]
    assert all(0 < float(line.rsplit(" ", 1)[1]) <= 1 for line in shown)


def test_the_own_reward_has_ten_lines():
    source = (TUTORIAL / "own_reward.py").read_text(encoding="utf-8").split('"""', 2)[2]
    assert len([line for line in source.splitlines() if line.strip()]) <= 11  # with its import
