"""Test double and reference: the LM protocol over a transformers model, and transformers' own constrained search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers.generation.utils
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.types import TokenRows


def random_qwen2(
    vocab: int, *, hidden: int = 32, layers: int = 2, seed: int = 0, spread: float = 0.3
) -> PreTrainedModel:
    """A small Qwen2 with random weights; the larger their ``spread``, the sharper its next-token distributions."""
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=spread,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).eval()


@dataclass
class _Cache:
    past: Any
    mask_RS: Tensor  # 1 where a slot holds a real token
    length_R: Tensor  # real tokens so far = position of the next one


class HfLM:
    """Right-padded prefill, then one token per row; counts the rows that it ran after the prefill."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.extended_rows = 0
        self.extensions = 0

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor, *, reserve: int) -> tuple[Tensor, _Cache]:
        self.left = reserve
        mask_BT = (torch.arange(tokens_BT.shape[1]) < lengths_B[:, None]).long()
        hidden = self.model.model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=True)
        last_BD = hidden.last_hidden_state[torch.arange(len(lengths_B)), lengths_B - 1]
        return self.model.lm_head(last_BD), _Cache(hidden.past_key_values, mask_BT, lengths_B)

    @torch.no_grad()
    def extend(self, cache: _Cache, parents_R: Tensor, tokens_R: Tensor) -> tuple[Tensor, _Cache]:
        assert self.left > 0, "the search extends its rows by more tokens than it reserved"
        self.left -= 1
        self.extensions += 1
        self.extended_rows += len(parents_R)
        cache.past.batch_select_indices(parents_R)
        mask_RS = torch.cat([cache.mask_RS[parents_R], torch.ones(len(parents_R), 1, dtype=torch.long)], dim=1)
        hidden = self.model.model(
            input_ids=tokens_R[:, None],
            attention_mask=mask_RS,
            position_ids=cache.length_R[parents_R, None],
            past_key_values=cache.past,
            use_cache=True,
        )
        logits_RV = self.model.lm_head(hidden.last_hidden_state[:, -1])
        return logits_RV, _Cache(hidden.past_key_values, mask_RS, cache.length_R[parents_R] + 1)


@torch.no_grad()
def exhaustive_logprobs(model: PreTrainedModel, prompt: list[int], trie: TokenTrie, space: str) -> list[list[float]]:
    """Per-token log-probs of every distinct path of the trie, in order of its leaves: one full forward pass each."""
    rows = []
    for leaf in range(trie.num_nodes):
        if not len(trie.items(leaf)):
            continue
        path = trie.paths_of(torch.tensor([leaf]))[0][0].tolist()
        logits_TV = model(torch.tensor([prompt + path])).logits[0, len(prompt) - 1 : -1]
        node, logprobs = trie.root, []
        for logits_V, token in zip(logits_TV, path, strict=True):
            tokens, _ = trie.children(node)
            admissible = torch.from_numpy(tokens) if space == "trie" else torch.arange(len(logits_V))
            chosen = int((admissible == token).nonzero())
            logprobs.append(float(logits_V[admissible].log_softmax(-1)[chosen]))
            node = trie.step(node, token)
        rows.append(logprobs)
    return rows


def transformers_search(
    model: PreTrainedModel,
    prompts: TokenRows,
    trie: TokenTrie,
    width: int,
    *,
    eos: int,
    space: str,
    penalty: float = 0.0,
) -> list[list[tuple[tuple[int, ...], float]]]:
    """(path, score) of the valid sequences that ``generate`` returns, in its order, for each prompt."""
    longest = int(prompts.lengths.max())
    ids_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row in range(len(prompts)):
        ids_BT[row, longest - len(prompts[row]) :] = torch.from_numpy(prompts[row])
        mask_BT[row, longest - len(prompts[row]) :] = 1

    node_of: dict[tuple[int, ...], int] = {(): trie.root}

    def allowed(_: int, sequence_T: Tensor) -> list[int]:
        path = tuple(sequence_T[longest:].tolist())
        if path not in node_of:
            before = node_of.get(path[:-1], -1)
            node_of[path] = trie.step(before, path[-1]) if before >= 0 else -1
        # Rows that stand for "no beam" may lie anywhere, and transformers wants an answer for them, too.
        node = node_of[path]
        return (trie.children(node)[0].tolist() if node >= 0 else []) or [eos]

    output = model.generate(
        ids_BT, attention_mask=mask_BT, num_beams=width, num_return_sequences=width, do_sample=False,
        prefix_allowed_tokens_fn=allowed, renormalize_logits=(space == "trie"), early_stopping="never",
        length_penalty=penalty, max_new_tokens=trie.max_depth, eos_token_id=eos, pad_token_id=eos,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in range(len(prompts))]
    for row, (sequence_T, score) in enumerate(zip(output.sequences, output.sequences_scores.tolist(), strict=True)):
        tokens = sequence_T[longest:].tolist()
        path = tuple(tokens[: tokens.index(eos) + 1]) if eos in tokens else tuple(tokens)
        if score > -1e6:  # transformers marks the places that no sequence fills with -1e9
            found[row // width].append((path, score))
    return found


class _DoubleTorch:
    """The torch module with its single-precision names meaning double."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def double_precision_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``generate`` keep its scores in float64: it casts logits and scores to float32, whatever the model's type."""
    monkeypatch.setattr(transformers.generation.utils, "torch", _DoubleTorch())
