"""Training goes on bit for bit after gradients and optimizer state were out of memory; meanwhile they take no room."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenBatch, TokenRows

SHAPE = Backbone("qwen2", 16, 2, 4, 2, 24, 21, rope_theta=1e4, max_position=64)
STEPS = 3


def rows(seed: int) -> TokenBatch:
    tokens = torch.randint(0, SHAPE.vocab, (3, 8), generator=torch.Generator().manual_seed(seed)).numpy()
    first, others = TokenRows.from_lists(list(tokens[:, :1])), TokenRows.from_lists(list(tokens[:, 1:]))
    return tree_batch(first, others, np.arange(len(tokens)), None)[0]


def trainable(precision: str, *, distributed: bool, offload: bool) -> Trainable:
    runtime.initialize(ModelConfig(), seed=1)
    model = build_model(SHAPE, ModelConfig(precision=precision), seed=3)
    trainer = TrainerConfig(distributed_optimizer=distributed, offload_optimizer=offload)
    return Trainable(model, SHAPE, trainer, lr=1e-2)


def optimizer_tensors(actor: Trainable) -> list[torch.Tensor]:
    """Moments, and master weights that do not share the model's memory."""
    own = {p.untyped_storage().data_ptr() for p in actor.model.parameters()}
    found = []
    for part in actor.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [state["exp_avg"], state["exp_avg_sq"]]
                if parameter.untyped_storage().data_ptr() not in own:
                    found.append(parameter.data)
    return found


def room(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def train(actor: Trainable) -> tuple[list[dict[str, float]], list[torch.Tensor], list[torch.Tensor]]:
    """Statistics, scores between the steps, final weights; every step but the first finds what was away before it."""
    stats, scores = [], []
    for step in range(STEPS):
        with actor.optimizer_offloaded():
            scores += actor.score([rows(100 + step)])
        stats.append(actor.update([MicroBatch(rows(step), lambda logp_N: (-logp_N.mean(), {}))], lr=1e-2))
    return stats, scores, [p.detach().clone() for p in actor.model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_nothing_changes_but_the_memory(precision: str, distributed: bool) -> None:
    kept = train(trainable(precision, distributed=distributed, offload=False))
    actor = trainable(precision, distributed=distributed, offload=True)
    away = train(actor)
    assert kept[0] == away[0]
    for ours, theirs in zip([*away[1], *away[2]], [*kept[1], *kept[2]], strict=True):
        assert torch.equal(ours, theirs)
    parameters = sum(p.numel() for p in actor.model.parameters())
    moved, gradients = optimizer_tensors(actor), [buffer.grad_data for buffer in actor.ddp.buffers]
    assert room(moved) >= (12 if precision == "bf16" else 8) * parameters
    assert room(gradients) >= 4 * parameters
    before = [tensor.clone() for tensor in moved]
    with actor.optimizer_offloaded():
        assert room(moved) == room(gradients) == 0
    assert all(torch.equal(now, then) for now, then in zip(moved, before, strict=True))


def test_it_comes_back_after_an_error_too() -> None:
    actor = trainable("fp32", distributed=True, offload=True)
    train(actor)
    before = [tensor.clone() for tensor in optimizer_tensors(actor)]
    with pytest.raises(KeyError), actor.optimizer_offloaded():
        raise KeyError("a search failed")
    assert all(torch.equal(now, then) for now, then in zip(optimizer_tensors(actor), before, strict=True))
