"""One optimizer step: against torch's AdamW, whatever the split into micro-batches, and when something goes wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.model.build import build_model
from tawin_nemo.models.megatron.model.forward import batch_logprobs, hidden_states
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenBatch, TokenRows
from tawin_nemo.util.errors import TawinError

SHAPE = Backbone("qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=51, rope_theta=1e4, max_position=256)
ROWS, LENGTH = 6, 9
SPLIT_TOLERANCE = 1e-6  # float32 sums in another order


@pytest.fixture(autouse=True)
def _one_process() -> None:
    runtime.initialize(ModelConfig(), seed=1)


def batch(rows: list[int]) -> TokenBatch:
    """Some of ROWS fixed token rows; every token but the first is scored."""
    tokens = torch.randint(0, SHAPE.vocab, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2))[rows]
    first, others = (TokenRows.from_lists(list(part.numpy())) for part in (tokens[:, :1], tokens[:, 1:]))
    return tree_batch(first, others, np.arange(len(rows)), None)[0]


def mean_loss(logp_N: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -logp_N.sum() / (ROWS * LENGTH), {"seen": torch.tensor(float(len(logp_N)))}


def trainable(*, dropout: float = 0.0, precision: str = "fp32", **trainer: object) -> Trainable:
    model = build_model(SHAPE, ModelConfig(dropout=dropout, precision=precision), seed=3)
    return Trainable(model, SHAPE, TrainerConfig(**trainer), lr=1e-3)  # type: ignore[arg-type]


def weights(subject: Trainable) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}


EVERYTHING = [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_gradients_may_be_kept_in_the_precision_of_the_weights(precision: str, distributed_optimizer: bool) -> None:
    """float32 by default; off, bf16 gradients are rounded, and those of a float32 model are what they were."""
    cfg, norms, after = ModelConfig(precision=precision), [], []
    for trainer in (TrainerConfig(), TrainerConfig(grad_reduce_in_fp32=False)):
        trainer = replace(trainer, distributed_optimizer=distributed_optimizer)
        subject = Trainable(build_model(SHAPE, cfg, seed=3), SHAPE, trainer, lr=1e-3)
        narrow = precision == "bf16" and not trainer.grad_reduce_in_fp32
        kinds = {parameter.main_grad.dtype for parameter in subject.model.parameters()}
        assert kinds == {torch.bfloat16 if narrow else torch.float32}
        norms.append(subject.update([MicroBatch(batch(part), mean_loss) for part in ([0, 1], [2, 3, 4, 5])], lr=1e-3))
        after.append(weights(subject))
    assert norms[1]["loss"] == norms[0]["loss"]
    assert norms[1]["grad_norm"] == pytest.approx(norms[0]["grad_norm"], rel=1e-2 if precision == "bf16" else 0)
    if precision == "bf16":
        assert norms[1]["grad_norm"] != norms[0]["grad_norm"]
    else:
        assert all(torch.equal(after[1][name], value) for name, value in after[0].items())


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_steps_are_those_of_adamw(distributed_optimizer: bool) -> None:
    """Two steps with different learning rates, clipping at work, no decay on norms and biases."""
    subject = trainable(distributed_optimizer=distributed_optimizer, clip_grad=0.5, weight_decay=0.1, adam_beta2=0.95)
    model = build_model(SHAPE, ModelConfig(), seed=3)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for lr in (1e-2, 3e-3):
        stats = subject.update([MicroBatch(batch(EVERYTHING[0]), mean_loss)], lr=lr)
        adamw.zero_grad()
        loss, _ = mean_loss(batch_logprobs(model, batch(EVERYTHING[0]), hidden_states(model, batch(EVERYTHING[0]))))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert float(norm) > 0.5  # or clipping would not be tested
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        assert stats["loss"] == pytest.approx(float(loss), rel=1e-6)
        assert stats["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert stats["seen"] == ROWS * LENGTH
    for name, p in model.named_parameters():
        # AdamW divides by sqrt(v): tiny gradients (key biases have none but rounding) may step differently
        if not name.endswith("linear_qkv.bias"):
            torch.testing.assert_close(weights(subject)[name], p.detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[5], [0, 1, 2, 3], [4]]])
def test_split_into_micro_batches_changes_nothing(split: list[list[int]]) -> None:
    whole, parts = trainable(), trainable()
    for _ in range(3):
        want = whole.update([MicroBatch(batch(rows), mean_loss) for rows in EVERYTHING], lr=1e-3)
        have = parts.update([MicroBatch(batch(rows), mean_loss) for rows in split], lr=1e-3)
        assert have == pytest.approx(want, rel=SPLIT_TOLERANCE * 10)
        assert have["loss"] == pytest.approx(want["loss"], rel=SPLIT_TOLERANCE)


def test_score_is_the_forward_pass_without_dropout() -> None:
    subject = trainable(dropout=0.5)
    plain = trainable()
    parts = [batch([0, 1]), batch([4])]
    subject.model.train()
    scored = subject.score(parts)
    assert subject.model.training
    assert subject.score([]) == []
    for part, logp_N in zip(parts, scored, strict=True):
        assert not logp_N.requires_grad
        expected = batch_logprobs(plain.model, part, hidden_states(plain.model.eval(), part))
        torch.testing.assert_close(logp_N, expected.detach(), rtol=0, atol=1e-6)


def test_a_rank_without_rows_steps_with_a_gradient_of_zero() -> None:
    subject = trainable(weight_decay=0.0)
    before = weights(subject)
    assert subject.update([], lr=1e-2) == {"loss": 0.0, "grad_norm": 0.0}
    assert all(torch.equal(before[name], value) for name, value in weights(subject).items())


def test_a_loss_without_gradient_is_accepted() -> None:
    stats = trainable().update([MicroBatch(batch([0]), lambda logp_N: (torch.tensor(0.25), {}))], lr=1e-3)
    assert stats == {"loss": 0.25, "grad_norm": 0.0}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(distributed_optimizer: bool) -> None:
    subject = trainable(distributed_optimizer=distributed_optimizer)
    before = weights(subject)
    bad = MicroBatch(batch([0]), lambda logp_N: ((logp_N - logp_N).sqrt().sum(), {}))
    with pytest.raises(TawinError, match=r"gradient norm is nan; not finite in \d+ tensors: .*weight"):
        subject.update([MicroBatch(batch([1]), mean_loss), bad], lr=1e-3)
    assert all(torch.equal(before[name], value) for name, value in weights(subject).items())
    stats = subject.update([MicroBatch(batch([1]), mean_loss)], lr=1e-3)  # and the next step is unharmed
    assert 0 < stats["grad_norm"] < 100


def test_dropout_repeats_with_the_step() -> None:
    runs = []
    for _ in range(2):
        subject = trainable(dropout=0.2)
        losses = []
        for step in range(3):
            runtime.seed_step(11, step)
            losses.append(subject.update([MicroBatch(batch(EVERYTHING[0]), mean_loss)], lr=1e-3)["loss"])
        runs.append(losses)
    assert runs[0] == runs[1]
    runtime.seed_step(12, 0)
    assert trainable(dropout=0.2).update([MicroBatch(batch(EVERYTHING[0]), mean_loss)], lr=1e-3)["loss"] != runs[0][0]
