"""Optional extensions: absent or present, the same weights come out; a package with only apex's name is not used."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core import optimizer
from megatron.core.tensor_parallel import layers

from tawin_nemo.config.schema import ModelConfig
from tawin_nemo.models.megatron.model import fused
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.models.megatron.parallel.shim import _WeightGradients
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


@pytest.fixture
def engine_products(monkeypatch):
    """Transformer Engine's product as a module, and no apex; what it was called with: (input, gradient, buffer)."""
    calls: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    def general_gemm(A, B, *, out_dtype, layout, accumulate, out, grad):
        assert layout == "NT"  # columns first: out = B.T @ A
        assert accumulate
        assert grad
        assert out_dtype == out.dtype
        calls.append((A.dtype, B.dtype, out.dtype))
        out.add_(B.float().t() @ A.float())
        return out, None, None, None

    names = ["transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.cpp_extensions"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(general_gemm=general_gemm, __path__=[]))
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None)
    monkeypatch.setattr(optimizer.Adam, "__module__", "transformer_engine.pytorch.optimizers")
    return calls


def test_in_bf16_the_engines_product_adds_to_the_float32_buffer(engine_products):
    """Without apex, as on a machine that has Transformer Engine alone: no weight gradient of its own is rounded."""
    subject = trainable(precision="bf16")
    assert subject.model.decoder.layers[0].mlp.linear_fc1.gradient_accumulation_fusion
    subject.accumulate([MicroBatch(batch([0, 1, 2]), mean_loss)])
    per_layer = 4
    assert engine_products == [(torch.bfloat16, torch.bfloat16, torch.float32)] * (2 * per_layer)
    ours = {name: p.main_grad.clone() for name, p in subject.model.named_parameters()}
    for module in subject.model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = False
    subject.accumulate([MicroBatch(batch([0, 1, 2]), mean_loss)])
    assert len(engine_products) == 2 * per_layer
    for name, parameter in subject.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.main_grad, rtol=2**-8, atol=1e-6, msg=name)
        if "linear" in name and name.endswith("weight"):
            assert not torch.equal(ours[name], ours[name].bfloat16().float()), name


def test_in_float32_the_engines_product_would_round_and_is_not_used(engine_products):
    with_it = two_steps()
    assert engine_products == []
    fused.fused_kernels.cache_clear()
    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = _WeightGradients
    for name, value in two_steps().items():
        assert torch.equal(with_it[name], value), name


def test_an_engine_without_such_a_product_changes_nothing(engine_products, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.cpp_extensions", SimpleNamespace())
    assert not fused.fused_kernels().weight_gradients


def test_a_package_of_the_same_name_is_not_used(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(fused._log, "warning", lambda message, *values: said.append(message % values))
    monkeypatch.setattr(fused, "find_apex", lambda: fused.Apex("/somewhere/apex", foreign=True))
    assert fused.fused_kernels().adam == "torch"
    assert said == [f"the package apex in /somewhere/apex is not NVIDIA's and is not used: {fused.FOREIGN_REMEDY}"]


def test_apex_is_absent_here():
    assert fused.find_apex() == fused.Apex()
