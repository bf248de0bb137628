"""Small real runs of the command line for tests: a generated dataset made once, nano models, any layout.

They are forked (``tests.forked``), the ranks of one that asks for several devices too: as srun starts them, without
torchrun, whose part is tested in test_launcher.py, test_separate.py and by the crash matrix.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import forked
from tests.distributed.launch import free_port

ROOT = Path(__file__).resolve().parents[2]
#: A complete run of a few seconds: SFT with early stopping, SFT continued, RL with TAWin and a reference, evaluation.
SMALL = (
    "data.dataset=prepared model.backbone=nano data.bpe_vocab_size=320 data.max_prompt_tokens=120 data.max_history=4 "
    "data.train_limit=192 data.eval_limit=24 sft.epochs=2 sft.global_batch_size=32 sft.micro_batch_tokens=2048 "
    "rl.prompts_per_step=8 rl.group_size=4 rl.max_steps=4 rl.lr=1e-3 rl.ensure_target=replace_last "
    "rl.micro_batch_tokens=2048 eval.beams=6 eval.ks=[1,3] trainer.save_interval=1 trainer.threads=1"
).split()

#: Relative tolerance of a logged number: float32 sums in another order over two dozen optimizer steps.
LOSS_RTOL = 2e-4


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def importable() -> dict[str, str]:
    """``environment`` for processes that start in another folder: they import this checkout, installed or not."""
    env = environment()
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))}


def command(*overrides: str, verb: str = "train") -> list[str]:
    return [sys.executable, "-m", "tawin_nemo", verb, *overrides]


def called(
    *overrides: str,
    verb: str = "train",
    timeout: float = 500,
    main: Callable[[Sequence[str]], int | None] = forked.verb,
) -> subprocess.CompletedProcess[str]:
    """Run the verb to its end; its exit code and what it said (that of rank 0, or of the rank that failed).

    ``main`` runs the command line in each process.
    """
    devices = [int(word.split("=")[1]) for word in overrides if word.startswith("trainer.devices=")]
    ranks = devices[-1] if devices else 1
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    environments = [
        {**environment(), **place, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if place else {})}
        for rank in range(ranks)
    ]
    return forked.call([verb, *overrides], environments, timeout, main)


def run(
    *overrides: str,
    verb: str = "train",
    timeout: float = 500,
    main: Callable[[Sequence[str]], int | None] = forked.verb,
) -> dict[str, Any]:
    """Run the verb to its end and return its last line; fails with both streams when it does not exit with 0."""
    done = called(*overrides, verb=verb, timeout=timeout, main=main)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def prepare_dataset(directory: Path) -> Path:
    """A small prepared dataset, through the real path from raw Amazon files."""
    result = run(
        "data.dataset=synthetic", f"run_dir={directory}", "prepare.synthetic_items=150", "prepare.synthetic_users=500",
        verb="prepare",
    )  # fmt: skip
    return Path(result["prepared"])


def metrics(run_dir: Path, stage: str) -> list[dict[str, float]]:
    lines = (run_dir / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_metrics(
    run_dir: Path, reference: Path, *stages: str, rtol: float = LOSS_RTOL, atol: float = 1e-6
) -> None:
    """Both runs logged the same steps and keys for these stages, and numbers that are equal within the tolerance."""
    for stage in stages:
        ours, expected = metrics(run_dir, stage), metrics(reference, stage)
        assert [line.keys() for line in ours] == [line.keys() for line in expected], stage
        for line, wanted in zip(ours, expected, strict=True):
            for key, value in wanted.items():
                assert math.isclose(line[key], value, rel_tol=rtol, abs_tol=atol), (stage, wanted["step"], key)
