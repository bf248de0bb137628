"""``trainer.deterministic``: what it sets, what contradicts it, and a whole run in torch's deterministic mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tawin_nemo.rollout import sampling
from tawin_nemo.run import determinism
from tawin_nemo.util.errors import ConfigError
from tests.train.runs import SMALL, run


@pytest.fixture(autouse=True)
def _torch_as_before():
    yield
    determinism.reset()


def test_libraries_get_values_that_are_deterministic():
    env = {"NCCL_ALGO": "Ring"}
    determinism.make_deterministic(env)
    assert env == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    determinism.reset()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")],
)
def test_a_contradiction_is_an_error_that_changes_nothing(name, value):
    env = {name: value}
    with pytest.raises(ConfigError, match=f"trainer.deterministic=true but {name}={value} is set: unset it"):
        determinism.make_deterministic(env)
    assert env == {name: value}
    assert not torch.are_deterministic_algorithms_enabled()


def test_cumulative_sums_of_draws_leave_the_gpu(monkeypatch):
    """torch has no deterministic cumsum of floating-point numbers on CUDA, and raises."""
    values, moved = torch.rand(9, dtype=torch.float64), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(len(self)) or self)
    plain = sampling._running_sum(values)
    assert moved == []
    determinism.make_deterministic({})
    assert torch.equal(sampling._running_sum(values), plain)
    assert moved == [9]


def test_every_operation_of_a_run_has_a_deterministic_form(small_dataset: Path, tmp_path: Path):
    """Also the draws of samples; the second run has the bytes of the first."""
    words = [*SMALL, f"data.root={small_dataset}", "trainer.deterministic=true", "rl.negatives=sample"]
    files = []
    for name in ("one", "two"):
        run(*words, f"run_dir={tmp_path / name}")
        files.append([(tmp_path / name / stage / "metrics.jsonl").read_bytes() for stage in ("sft", "rl")])
    assert files[0] == files[1]
    assert all(len(metrics) > 100 for metrics in files[0])
