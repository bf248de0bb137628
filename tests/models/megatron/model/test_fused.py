"""Optional extensions: absent or present, the same weights come out; a package with only apex's name is not used."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import layers

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.model import fused
from tawin_nemo.models.megatron.parallel import runtime
from tests.models.megatron.optim.test_trainable import MicroBatch, batch, mean_loss, trainable, weights

#: Two AdamW steps of lr 1e-3 after gradients that were summed in another order.
WEIGHT_ATOL = 2e-6


@pytest.fixture(autouse=True)
def _one_process():
    runtime.initialize(ModelConfig(), seed=1)
    fused.fused_kernels.cache_clear()
    yield
    fused.fused_kernels.cache_clear()


def two_steps() -> dict[str, torch.Tensor]:
    subject = trainable()
    for _ in range(2):
        subject.update([MicroBatch(batch([0, 1, 2]), mean_loss), MicroBatch(batch([3]), mean_loss)], lr=1e-3)
    return weights(subject)


def test_without_fused_weight_gradients_the_same_weights_come_out(monkeypatch):
    with_them = two_steps()
    fused.fused_kernels.cache_clear()
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    subject = trainable()
    linear = subject.model.decoder.layers[0].mlp.linear_fc1
    assert not linear.gradient_accumulation_fusion
    without = two_steps()
    for name, value in with_them.items():
        torch.testing.assert_close(without[name], value, rtol=0, atol=WEIGHT_ATOL)


def test_without_a_fused_optimizer_the_same_weights_come_out(monkeypatch):
    with_it = two_steps()
    monkeypatch.setattr(fused, "fused_kernels", lambda: fused.FusedKernels("another", weight_gradients=True))
    subject = trainable()
    assert not subject.optimizer.param_groups[0].get("fused")
    without = two_steps()
    for name, value in with_it.items():
        torch.testing.assert_close(without[name], value, rtol=0, atol=WEIGHT_ATOL)


def test_what_was_found_is_said_once(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(fused._log, "info", lambda message, *values: said.append(message % values))
    trainable()
    trainable()
    assert said == ["AdamW of torch; weight gradients are added as they are computed"]  # on a CPU: by the shim
    assert logging.getLogger("tawin_nemo").handlers


def test_transformer_engines_layers_add_their_own_gradients():
    layer = SimpleNamespace(fuse_wgrad_accumulation=False)
    fused.fuse(SimpleNamespace(modules=lambda: [layer, SimpleNamespace()]), SimpleNamespace(chained_optimizers=[]))
    assert layer.fuse_wgrad_accumulation


def test_a_package_of_the_same_name_is_not_used(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(fused._log, "warning", lambda message, *values: said.append(message % values))
    monkeypatch.setattr(fused, "find_apex", lambda: fused.Apex("/somewhere/apex", foreign=True))
    assert fused.fused_kernels().adam == "torch"
    assert said == [f"the package apex in /somewhere/apex is not NVIDIA's and is not used: {fused.FOREIGN_REMEDY}"]


def test_apex_is_absent_here():
    assert fused.find_apex() == fused.Apex()
