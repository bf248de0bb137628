"""First scales of delayed FP8 scaling, with a module that keeps them as Transformer Engine's do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tawin_nemo.models.megatron.model.fp8_scales import calibrate


class Scaled(torch.nn.Module):
    """As a module of Transformer Engine: scales exist after the first pass and move only with gradient enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, SimpleNamespace] = {}
        self.used: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaling = self.fp8_meta.setdefault("scaling_fwd", SimpleNamespace(scale=torch.ones(3)))
        self.used.append(float(scaling.scale[0]))
        if torch.is_grad_enabled():
            scaling.scale = torch.full((3,), 448.0 / float(x.abs().max()))
        return x


class Model(torch.nn.Module):
    def __init__(self, fp8: str | None = "hybrid", recipe: str = "delayed") -> None:
        super().__init__()
        self.config = SimpleNamespace(fp8=fp8, fp8_recipe=recipe)
        self.inner = Scaled()

    def passes(self, times: int) -> list[float]:
        """The scales that ``times`` passes without gradient used, those of calibration among them."""
        x = torch.full((2,), 0.02)
        with torch.no_grad():
            for _ in range(times):
                calibrate(self, lambda: self.inner(x))
                self.inner(x)
        return self.inner.used


def test_the_first_rollout_has_scales_and_later_ones_change_nothing():
    assert Model().passes(3) == [1.0, *3 * [pytest.approx(22400.0)]]


def test_loaded_scales_stay():
    model = Model()
    model.inner.fp8_meta["scaling_fwd"] = SimpleNamespace(scale=torch.tensor([7.0, 1.0, 1.0]))
    assert model.passes(2) == [7.0, 7.0]


@pytest.mark.parametrize(("fp8", "recipe"), [(None, "delayed"), ("hybrid", "tensorwise"), ("e4m3", "blockwise")])
def test_other_precisions_run_once(fp8: str | None, recipe: str):
    assert len(Model(fp8, recipe).passes(2)) == 2


def test_a_training_pass_runs_once():
    model = Model()
    calibrate(model, lambda: pytest.fail("a pass with gradient sets the scales by itself"))
    assert model.inner.used == []
