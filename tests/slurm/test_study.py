"""A study whose runs are jobs of a real Slurm: trained, collected, compared; a wrong key is a failed run.

Takes a minute, so ``tests/run.sh --full`` runs it (TAWIN_FULL=1).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.jobs import REPOSITORY, Slurm
from tests.train.runs import SMALL, importable, prepare_dataset

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]


def write_study(folder: Path, data: Path) -> Path:
    keys = dict(word.split("=", 1) for word in SMALL) | {"data.root": str(data), "rl.max_steps": "2"}
    (folder / "recipe.yaml").write_text("name: small\n", encoding="utf-8")
    content = {
        "study": "jobs", "recipe": "recipe.yaml",
        "results": str(folder / "results"), "run_root": str(folder / "runs"),
        "set": {key: yaml.safe_load(value) for key, value in keys.items()},
        "splits": ["valid"], "metrics": ["recall@3"],
        "arms": {"sft": {"rl.enabled": False}, "rl": {"after": "sft", "sft.enabled": False, "rl.init": "base"}},
        "compare": [["rl", "sft"]],
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_runs_are_jobs(slurm: Slurm, tmp_path: Path) -> None:
    study = write_study(tmp_path, prepare_dataset(tmp_path / "data"))
    options = "sbatch=[--cpus-per-task=1,--gpus-per-node=0]"
    words = [sys.executable, "-m", "tawin_nemo", "study", "--recipe", str(study), "launcher=slurm", options]
    done = subprocess.run(
        words, cwd=REPOSITORY, env=slurm.environment | importable(), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["finished"], result["failed"]) == (2, [])
    for name in ("sft.seed1", "rl.seed1"):
        run = tmp_path / "runs" / name
        number = (run / "slurm_job").read_text()
        assert f"submitted job {number}" in (run / "attempt.1.log").read_text()
        assert (run / "slurm_code").read_text().strip() == "0"
    assert "`rl` - `sft`" in (tmp_path / "results" / "README.md").read_text()
