"""Test double and reference: the LM protocol over a transformers model, and transformers' own constrained search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.generation.utils
from sequence_lm import SequenceLM, Tokens
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.maths.segments import segment_log_softmax
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


class HfLM(SequenceLM):
    """Log-probs by one forward pass over all tokens of each row that is asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(int(model.config.vocab_size), int(model.config.max_position_embeddings))
        self.model = model

    @torch.no_grad()
    def edge_logprobs(self, sequences: list[Tokens], position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        tokens_NT, lengths_N = TokenRows.from_lists([list(sequence) for sequence in sequences]).padded()
        mask_NT = (torch.arange(tokens_NT.shape[1]) < lengths_N[:, None]).long()
        hidden_NTD = self.model.model(input_ids=tokens_NT, attention_mask=mask_NT, use_cache=False).last_hidden_state
        logits_NV = self.model.lm_head(hidden_NTD[torch.arange(len(sequences)), lengths_N - 1])
        logit_E = logits_NV[position_E, token_E]
        if space == "trie":
            return segment_log_softmax(logit_E, position_E, len(sequences))
        return logit_E - logits_NV.logsumexp(dim=-1)[position_E]


@torch.no_grad()
def exhaustive_logprobs(model: PreTrainedModel, prompt: list[int], trie: TokenTrie, space: str) -> list[list[float]]:
    """Per-token log-probs of every distinct path of the trie, in order of its leaves: one full forward pass each."""
    rows = []
    for leaf in leaves_of(trie):
        path = trie.paths_of(torch.tensor([leaf]))[0][0].tolist()
        logits_TV = model(torch.tensor([prompt + path])).logits[0, len(prompt) - 1 : -1]
        position, logprobs = trie.root, []
        for logits_V, token in zip(logits_TV, path, strict=True):
            tokens, _ = trie.children(position)
            admissible = torch.from_numpy(tokens) if space == "trie" else torch.arange(len(logits_V))
            chosen = int((admissible == token).nonzero())
            logprobs.append(float(logits_V[admissible].log_softmax(-1)[chosen]))
            position = trie.step(position, token)
        rows.append(logprobs)
    return rows


def leaves_of(trie: TokenTrie) -> list[int]:
    """The leaf of every distinct path, ascending."""
    return sorted(set(trie.leaf_I.tolist()))


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
