"""The slow oracle of beam search: one prompt, one token at a time, plain lists, no shortcut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tawin_nemo.catalog.trie import TokenTrie

#: Log-probs of the admissible tokens after the prompt and a path.
PathLogProbs = Callable[[tuple[int, ...], list[int]], list[float]]


@dataclass(frozen=True)
class Path:
    position: int  # in the trie; a finished path's is its leaf
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0

    def normalised(self, length_penalty: float) -> float:
        return self.score / len(self.tokens) ** length_penalty


def token_synchronous_search(
    logprobs: PathLogProbs, trie: TokenTrie, width: int, length_penalty: float = 0.0
) -> list[Path]:
    """The W best finished paths, best first.

    Every step ranks all continuations of all running paths. Sorting is stable: equal scores stay in the order of the
    parents and then of the tokens; among finished ones the earlier stay in front.
    """
    running, finished = [Path(trie.root)], []
    while running:
        ranked = sorted(
            (longer for path in running for longer in _continuations(path, logprobs, trie)),
            key=lambda path: -path.score,
        )
        ended = [path for path in ranked[:width] if len(trie.items(path.position))]
        finished = sorted(finished + ended, key=lambda path: -path.normalised(length_penalty))[:width]
        running = [path for path in ranked if not len(trie.items(path.position))][:width]
    return finished


def _continuations(path: Path, logprobs: PathLogProbs, trie: TokenTrie) -> list[Path]:
    tokens, positions = (array.tolist() for array in trie.children(path.position))
    return [
        Path(position, (*path.tokens, token), (*path.logprobs, value), path.score + value)
        for token, position, value in zip(tokens, positions, logprobs(path.tokens, tokens), strict=True)
        if value > -math.inf
    ]
