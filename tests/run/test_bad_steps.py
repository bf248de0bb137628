"""Steps that are not finite: left out and kept for a look, too many of them end the run."""

import pytest
import torch
from safetensors.torch import load_file

from tawin_nemo.run.bad_steps import guarded
from tawin_nemo.run.stage import Progress
from tawin_nemo.types import TokenBatch
from tawin_nemo.util.errors import NonFiniteStep, TawinError
from tests.train.runs import SMALL, called, metrics


def batch(first: int) -> TokenBatch:
    tokens = torch.arange(first, first + 3)
    one = torch.tensor([3])
    return TokenBatch(tokens, torch.arange(3), torch.full((3,), 3), one, one * 0, one - 1, one * 0, one)


def bad() -> dict[str, float]:
    raise NonFiniteStep("the loss is nan; the weights were not changed.")


def test_a_finite_step_is_handed_through(tmp_path):
    done = Progress(step=4)
    assert guarded(lambda: {"loss": 1.0}, [batch(5)], done=done, limit=0, directory=tmp_path / "skipped") == {
        "loss": 1.0
    }
    assert done.skipped_steps == 0
    assert not (tmp_path / "skipped").exists()


def test_a_bad_step_is_left_out_and_its_batches_are_kept(tmp_path):
    done = Progress(step=4)
    assert guarded(bad, [batch(5), batch(8)], done=done, limit=1, directory=tmp_path) == {"skipped": 1.0}
    assert done.skipped_steps == 1
    kept = load_file(tmp_path / "step_5.rank0.safetensors")
    assert kept["0.tokens_S"].tolist() == [5, 6, 7]
    assert kept["1.tokens_S"].tolist() == [8, 9, 10]
    done.step = 9
    with pytest.raises(
        TawinError, match=r"step 10: the loss is nan.*That makes 2 of at most trainer.max_skipped_steps=1"
    ):
        guarded(bad, [batch(5)], done=done, limit=1, directory=tmp_path)
    assert (tmp_path / "step_10.rank0.safetensors").is_file()


def test_a_learning_rate_that_destroys_the_model_ends_the_run(small_dataset, tmp_path):
    arguments = [*SMALL, f"data.root={small_dataset}", f"run_dir={tmp_path}", "sft.lr=1", "sft.warmup=0"]
    arguments += ["trainer.weight_decay=1e6", "trainer.max_skipped_steps=1"]  # every step takes weights times -1e6
    done = called(*arguments)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "trainer.max_skipped_steps=1" in done.stderr.splitlines()[-1]
    steps = [line for line in metrics(tmp_path, "sft") if "lr" in line]
    skipped = ["skipped" in line for line in steps]
    assert skipped == [False] * (len(steps) - 1) + [True]
    assert (tmp_path / "sft" / "skipped" / f"step_{len(steps)}.rank0.safetensors").is_file()
