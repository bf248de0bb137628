"""Tree-packed log-probs and gradients equal those of repeated prompts with a dense softmax, in the gradient buffers.

The oracle runs every candidate as a row of its own through plain causal attention, multiplies the whole head and lets
autograd do the rest; nothing of the packing, of the sampled dot products or of the row gradients is in it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.backbones import Backbone
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import AnswerIndex, tree_batch
from tawin_nemo.models.megatron.model import head
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.model.forward import batch_logprobs, hidden_states
from tawin_nemo.models.megatron.model.head import head_weight_VD
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable, score
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.types import TokenRows

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # log-probs; gradients relative to the largest of a tensor
EOS = 39


def shape(tied: bool) -> Backbone:
    return Backbone(
        "qwen2", hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, vocab=40, tied=tied, rope_theta=1e4, init_std=0.2,
        max_position=128,
    )  # fmt: skip


def task() -> tuple[TokenRows, TokenRows, np.ndarray, TokenTrie]:
    """Ragged prompts, 3 to 7 answers each with repeats, over 60 paths that fork early and late."""
    generator = np.random.default_rng(5)
    paths = sorted({(*generator.integers(0, 4, generator.integers(1, 6)).tolist(), EOS) for _ in range(90)})
    prompts = TokenRows.from_lists([generator.integers(0, 39, size).tolist() for size in (5, 1, 9, 4, 7)])
    prompt_A = np.repeat(np.arange(5), [5, 7, 3, 1, 6])
    answers = [list(paths[i]) for i in generator.integers(0, len(paths), len(prompt_A))]
    answers[1] = answers[0]
    return prompts, TokenRows.from_lists(answers), prompt_A, TokenTrie.from_paths([list(path) for path in paths])


def oracle(
    model: HiddenGPT, prompts: TokenRows, answers: TokenRows, prompt_A: np.ndarray, trie: TokenTrie | None,
    index: AnswerIndex,
) -> Tensor:  # fmt: skip
    """logp_N of the indexed tokens."""
    rows = []
    for answer in range(len(answers)):
        prompt = prompts[int(prompt_A[answer])].tolist()
        hidden_SD = model(torch.tensor([prompt + answers[answer].tolist()]), None, None)[:, 0]
        logits_TV = (hidden_SD[len(prompt) - 1 : -1] @ head_weight_VD(model).T)[:, : model.real_vocab]
        position = trie.root if trie is not None else 0
        for token, target in enumerate(answers[answer].tolist()):
            if trie is not None:
                allowed = torch.full_like(logits_TV[token], -torch.inf)
                allowed[torch.as_tensor(np.asarray(trie.children(position)[0], dtype=np.int64))] = 0.0
                rows.append((logits_TV[token] + allowed).log_softmax(-1)[target])
                position = trie.step(position, target)
            else:
                rows.append(logits_TV[token].log_softmax(-1)[target])
    offsets = torch.from_numpy(answers.offsets)
    return torch.stack(rows)[offsets[index.answer_N] + index.token_N]


def weighted(logp_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Uneven weights, so that no two log-probs can be mistaken for each other."""
    weights_N = torch.linspace(-1.0, 2.0, len(logp_N), dtype=logp_N.dtype)
    return (logp_N * weights_N).sum(), {}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("space", ["trie", "vocab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_trees_learn_what_repeated_prompts_learn(
    dtype: torch.dtype, space: str, tied: bool, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_LIVE_LOGITS", {"cpu": 1})
    monkeypatch.setattr(head, "_MIN_SLICE", 7)
    monkeypatch.setattr(head, "_KEPT_EXPONENTIALS", 0 if recompute == "full" else 2**23)
    runtime.initialize(ModelConfig(), seed=1)
    model = build_model(shape(tied), ModelConfig(recompute=recompute), seed=3).to(dtype)
    prompts, answers, prompt_A, full_trie = task()
    trie = full_trie if space == "trie" else None
    batch, index = tree_batch(prompts, answers, prompt_A, trie)
    assert len(batch.tokens_S) < 0.6 * (prompts.lengths[prompt_A] + answers.lengths).sum()  # or nothing was shared
    logp_N = score(model, [batch])[0]
    expected_N = oracle(model, prompts, answers, prompt_A, trie, index)
    torch.testing.assert_close(logp_N, expected_N.detach(), rtol=0, atol=TOLERANCE[dtype])

    weighted(expected_N)[0].backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainable = Trainable(model, shape(tied), TrainerConfig(distributed_optimizer=False), lr=0.0)
    stats = trainable.accumulate([MicroBatch(batch, weighted)])
    assert stats["loss"] == pytest.approx(float(weighted(expected_N)[0]), rel=1e-4)
    for name, p in model.named_parameters():
        # the buffers are float32 whatever the model: float64 gradients are rounded once
        tolerance = max(TOLERANCE[dtype], 1e-6) * float(want[name].abs().max() + 1e-3) * 10
        torch.testing.assert_close(p.main_grad, want[name].float(), rtol=0, atol=tolerance, msg=name)


def test_double_precision_gradients_without_buffers_are_exact() -> None:
    """Against the oracle at float64's own precision: the bare model's dense gradients."""
    runtime.initialize(ModelConfig(), seed=1)
    model = build_model(shape(True), ModelConfig(), seed=3).double()
    prompts, answers, prompt_A, trie = task()
    for space in (trie, None):
        batch, index = tree_batch(prompts, answers, prompt_A, space)
        model.zero_grad()
        weighted(batch_logprobs(model, batch, hidden_states(model, batch)))[0].backward()
        have = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        weighted(oracle(model, prompts, answers, prompt_A, space, index))[0].backward()
        for got, p in zip(have, model.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=0, atol=1e-11 * float(p.grad.abs().max() + 1))
