"""Test doubles of the LM protocol whose cache is a list of token sequences, one per row; they count what is run."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tawin_nemo.types import TokenRows

Tokens = tuple[int, ...]


@dataclass
class Rows:
    """Row r is the last token of ``sequence[r]``; every call that returns another cache spends the old one."""

    sequence: list[Tokens]
    prompt: list[int]
    prompts: int
    spent: bool = False

    def spend(self) -> Rows:
        assert not self.spent, "an old cache was used again"
        self.spent = True
        return self


@dataclass
class SequenceLM:
    """Everything but the log-probs."""

    vocab_size: int
    max_positions: int = 2048
    prefilled: list[Tokens] = field(default_factory=list)
    ran: list[Tokens] = field(default_factory=list)  # after the prefill, each with all tokens before it
    extensions: int = 0
    scored: int = 0  # rows whose log-probs were read

    def prefill(self, prompts: TokenRows) -> Rows:
        assert prompts.lengths.min() >= 1
        sequences = [tuple(prompts[row].tolist()) for row in range(len(prompts))]
        self.prefilled += sequences
        return Rows(sequences, list(range(len(prompts))), len(prompts))

    def extend(self, cache: Rows, parent_R: Tensor, chains: TokenRows) -> Rows:
        assert len(parent_R) == len(chains) > 0
        assert chains.lengths.min() >= 1
        cache.spend()
        self.extensions += 1
        new = Rows(list(cache.sequence), list(cache.prompt), cache.prompts)
        for row, parent in enumerate(parent_R.tolist()):
            assert 0 <= parent < len(cache.sequence)
            sequence = cache.sequence[parent]
            for token in chains[row].tolist():
                sequence = (*sequence, token)
                assert len(sequence) <= self.max_positions
                self.ran.append(sequence)
                new.sequence.append(sequence)
                new.prompt.append(cache.prompt[parent])
        return new

    def rows(self, cache: Rows) -> int:
        assert not cache.spent
        return len(cache.sequence)

    def keep(self, cache: Rows, prompt_M: Tensor) -> tuple[Rows, Tensor]:
        cache.spend()
        kept = prompt_M.tolist()
        assert kept == sorted(set(kept))
        rows = [row for row, prompt in enumerate(cache.prompt) if prompt in kept]
        new_R = torch.full((len(cache.sequence),), -1)
        new_R[rows] = torch.arange(len(rows))
        return Rows([cache.sequence[r] for r in rows], [kept.index(cache.prompt[r]) for r in rows], len(kept)), new_R

    def join(self, first: Rows, second: Rows) -> tuple[Rows, Tensor, Tensor]:
        first.spend()
        second.spend()
        places = [(cache, row) for cache in (first, second) for row in range(cache.prompts)]
        places += [(cache, row) for cache in (first, second) for row in range(cache.prompts, len(cache.sequence))]
        shift = {id(first): 0, id(second): first.prompts}
        new = {(id(cache), row): place for place, (cache, row) in enumerate(places)}
        joined = Rows(
            [cache.sequence[row] for cache, row in places],
            [cache.prompt[row] + shift[id(cache)] for cache, row in places],
            first.prompts + second.prompts,
        )
        numbers = [torch.tensor([new[id(cache), r] for r in range(len(cache.sequence))]) for cache in (first, second)]
        return joined, numbers[0], numbers[1]

    def logprobs(self, cache: Rows, row_N: Tensor, position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        assert not cache.spent
        assert (position_E.diff() >= 0).all()
        assert space in ("trie", "vocab")
        self.scored += len(row_N)
        return self.edge_logprobs([cache.sequence[row] for row in row_N.tolist()], position_E, token_E, space)

    def best_tokens(self, cache: Rows, row_N: Tensor) -> Tensor:
        position_E = torch.arange(len(row_N)).repeat_interleave(self.vocab_size)
        token_E = torch.arange(self.vocab_size).repeat(len(row_N))
        return self.logprobs(cache, row_N, position_E, token_E, "vocab").view(-1, self.vocab_size).argmax(dim=1)

    def top_tokens(self, cache: Rows, row_N: Tensor, count: int) -> tuple[Tensor, Tensor]:
        position_E = torch.arange(len(row_N)).repeat_interleave(self.vocab_size)
        token_E = torch.arange(self.vocab_size).repeat(len(row_N))
        logp_NV = self.logprobs(cache, row_N, position_E, token_E, "vocab").view(-1, self.vocab_size)
        logp_NK, token_NK = logp_NV.topk(min(count, self.vocab_size), dim=1)
        return token_NK, logp_NK

    def edge_logprobs(self, sequences: list[Tokens], position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        raise NotImplementedError

    def path_logprobs(self, sequence: Sequence[int], tokens: list[int], space: str) -> list[float]:
        """Log-probs of the admissible tokens after one sequence."""
        position_E = torch.zeros(len(tokens), dtype=torch.long)
        return self.edge_logprobs([tuple(sequence)], position_E, torch.tensor(tokens), space).tolist()


@dataclass
class TableLM(SequenceLM):
    """Log-probs that are a fixed function of all tokens before: multiples of 1/4, so that sums are exact and tie often.

    They need not sum to one. In trie space a token without an alternative has 0; one in eight is impossible.
    """

    seed: int = 0
    dtype: torch.dtype = torch.float64
    impossible: bool = True

    def edge_logprobs(self, sequences: list[Tokens], position_E: Tensor, token_E: Tensor, space: str) -> Tensor:
        count_N = torch.bincount(position_E, minlength=len(sequences)).tolist()
        tokens = iter(token_E.tolist())
        values: list[float] = []
        for sequence, count in zip(sequences, count_N, strict=True):
            values += self.path_logprobs(sequence, [next(tokens) for _ in range(count)], space)
        return torch.tensor(values, dtype=self.dtype)

    def path_logprobs(self, sequence: Sequence[int], tokens: list[int], space: str) -> list[float]:
        if space == "trie" and len(tokens) == 1:
            return [0.0]
        draws = [zlib.crc32(repr((self.seed, *sequence, token)).encode()) % 8 for token in tokens]
        return [-torch.inf if self.impossible and draw == 7 else -(draw % 4) / 4 for draw in draws]
