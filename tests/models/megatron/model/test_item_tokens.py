"""Projected item vectors in the place of words (``model.item_tokens``), against a slow reference that puts the
embedding together token by token: values, gradients, search, checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import ModelConfig, TrainerConfig
from tawin_nemo.data.trees import tree_batch
from tawin_nemo.models.megatron.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from tawin_nemo.models.megatron.decode.lm import MegatronLM
from tawin_nemo.models.megatron.model.build import HiddenGPT, build_model
from tawin_nemo.models.megatron.model.forward import batch_logprobs, hidden_states
from tawin_nemo.models.megatron.model.item_tokens import add_item_tokens
from tawin_nemo.models.megatron.optim.trainable import MicroBatch, Trainable
from tawin_nemo.models.megatron.parallel import runtime
from tawin_nemo.rollout.lm import MeteredLM
from tawin_nemo.rollout.scoring import check_prompts
from tawin_nemo.types import FIRST_ITEM_TOKEN, TokenBatch, TokenRows
from tawin_nemo.util.errors import DataError
from tests.models.megatron.model.test_lora import QWEN

ITEMS = 7
VECTORS_IE = 3.0 * torch.randn(ITEMS, 5, generator=torch.Generator().manual_seed(2))
ITEM = FIRST_ITEM_TOKEN
PROMPTS = TokenRows.from_lists([[4, ITEM + 3, 9, ITEM, 11], [5, 6, 7], [ITEM + 6, ITEM + 3, 1]])
ANSWERS = TokenRows.from_lists([[8, 2], [12, 2], [8, 3]])


def batch() -> TokenBatch:
    return tree_batch(PROMPTS, ANSWERS, np.arange(3), None)[0]


def plain(dtype: torch.dtype = torch.float64, *, tied: bool = True) -> HiddenGPT:
    runtime.initialize(ModelConfig(), seed=1)
    shape = QWEN if tied else replace(QWEN, family="llama", tied=False)
    return build_model(shape, ModelConfig(), seed=3).to(dtype)


def with_items(dtype: torch.dtype = torch.float64, *, seed: int = 4, tied: bool = True) -> HiddenGPT:
    model = plain(dtype, tied=tied)
    add_item_tokens(model, VECTORS_IE, seed=seed, std=QWEN.init_std)
    return model


def logprobs(model: HiddenGPT, rows: TokenBatch) -> Tensor:
    return batch_logprobs(model, rows, hidden_states(model, rows))


def by_hand(model: HiddenGPT, weights: dict[str, Tensor]) -> Tensor:
    """Log-probs where a hook gives the embedding of every token, made one by one."""
    table_VD = model.embedding.word_embeddings.weight
    scaled_IE = VECTORS_IE.double() / VECTORS_IE.double().square().mean().sqrt()

    def embedded(module, args, output):
        rows = []
        for token in args[0].flatten().tolist():
            if token < FIRST_ITEM_TOKEN:
                rows.append(table_VD[token])
            else:
                inner_D = weights["inner.weight"] @ scaled_IE[token - FIRST_ITEM_TOKEN] + weights["inner.bias"]
                rows.append(weights["outer.weight"] @ F.gelu(inner_D) + weights["outer.bias"])
        return torch.stack(rows)[None]

    handle = model.embedding.word_embeddings.register_forward_hook(embedded)
    try:
        words = replace(batch(), tokens_S=batch().tokens_S)
        return logprobs(model, words)
    finally:
        handle.remove()


@pytest.mark.parametrize("tied", [True, False])
def test_values_and_gradients_are_those_of_embeddings_made_by_hand(tied):
    model, other = with_items(tied=tied), plain(tied=tied)
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.item_tokens.named_parameters()}
    ours_N, theirs_N = logprobs(model, batch()), by_hand(other, weights)
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-10, atol=1e-12)
    scale_N = torch.linspace(-1.0, 2.0, len(ours_N), dtype=torch.float64)
    (ours_N * scale_N).sum().backward()
    (theirs_N * scale_N).sum().backward()
    for name, weight in model.item_tokens.named_parameters():
        assert weight.grad.abs().max() > 0, name
        torch.testing.assert_close(weight.grad, weights[name].grad, rtol=1e-9, atol=1e-12)
    for (name, ours), theirs in zip(
        [pair for pair in model.named_parameters() if not pair[0].startswith("item_tokens.")], other.parameters(),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_prompts_without_items_are_those_of_the_plain_model():
    rows = tree_batch(TokenRows.from_lists([[5, 6, 7]]), TokenRows.from_lists([[12, 2]]), np.arange(1), None)[0]
    assert torch.equal(logprobs(with_items(), rows), logprobs(plain(), rows))


def test_the_size_of_an_embedding_is_that_of_a_word():
    model = plain(torch.float32)
    add_item_tokens(model, torch.randn(500, 40, generator=torch.Generator().manual_seed(1)), seed=5, std=0.2)
    embedded_ID = model.item_tokens(torch.arange(500))
    assert 0.15 < float(embedded_ID.std()) < 0.25


def test_the_search_reads_items_as_training_does():
    model = with_items(torch.float32).eval()
    for fast in (True, False):
        lm = MegatronLM(model, QWEN, use_inference_forward=fast)
        cache = lm.prefill(PROMPTS)
        cache = lm.extend(cache, torch.arange(3), TokenRows.from_lists([[8], [12], [8]]))
        index_N, token_N = torch.arange(6), torch.tensor([8, 12, 8, 2, 2, 3])
        logp_N = lm.logprobs(cache, index_N, index_N, token_N, "vocab")
        expected_N = logprobs(model, batch()).detach()
        torch.testing.assert_close(logp_N[[0, 3, 1, 4, 2, 5]], expected_N, rtol=1e-5, atol=1e-5)


def test_prompts_with_items_beyond_the_catalog_are_refused():
    trie = TokenTrie.from_paths(ANSWERS)
    lm = MeteredLM(MegatronLM(with_items(torch.float32), QWEN))
    check_prompts(lm, PROMPTS, trie)
    with pytest.raises(DataError, match=rf"prompt row 1 has token {ITEM + ITEMS}"):
        check_prompts(lm, TokenRows.from_lists([[ITEM, 3], [4, ITEM + ITEMS]]), trie)
    with pytest.raises(DataError, match=rf"prompt row 0 has token {ITEM}"):
        check_prompts(MegatronLM(plain(torch.float32), QWEN), TokenRows.from_lists([[ITEM, 3]]), trie)


def updates(trainable: Trainable, count: int) -> list[dict[str, float]]:
    loss = MicroBatch(batch(), lambda logp_N: (-logp_N.sum() / 6, {}))
    return [trainable.update([loss], lr=1e-2) for _ in range(count)]


@pytest.mark.parametrize("sharded", [True, False])
def test_a_checkpoint_holds_the_projection_and_continues_bit_for_bit(sharded, tmp_path):
    trainer = TrainerConfig(distributed_optimizer=sharded)
    first = Trainable(with_items(torch.float32), QWEN, trainer, lr=1e-2)
    before = {name: weight.detach().clone() for name, weight in first.model.item_tokens.named_parameters()}
    losses = [step["loss"] for step in updates(first, 5)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(weight, before[name]) for name, weight in first.model.item_tokens.named_parameters())
    save_checkpoint(tmp_path / "step_5", model=first.model, trainable=first, state={"step": 5})
    again = Trainable(with_items(torch.float32, seed=9), QWEN, trainer, lr=1e-2)
    assert load_checkpoint(tmp_path / "step_5", model=again.model, trainable=again) == {"step": 5}
    assert updates(again, 2) == updates(first, 2)
    for ours, theirs in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any("vectors" in name for name in first.model.state_dict())
