"""BigRec's evaluation (arXiv 2308.08434): free text, grounded in the catalog by embeddings (``eval.grounding``).

The model writes what it likes: over the whole vocabulary, greedily (one beam) or by beam search, of which the best
counts. Text and items are embedded by the model itself: the hidden state behind the final norm at the last token of the
text alone, without any prompt. All paths are ranked by the Euclidean distance of their embeddings to that of the text,
nearest first: BigRec's step 2.1, without its weighting by popularity or by a collaborative model.

A row whose output is empty ranks nothing. Paths at equal distance rank in the order of their first items; items on one
path share its rank and the credit of a hit, as ``eval.collision`` says.

Axes beyond ``types``: L paths (leaves of the trie).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.config.schema import EvalConfig
from tawin_nemo.data.samples import Samples
from tawin_nemo.eval.evaluate import metric_names, per_user_table
from tawin_nemo.eval.measured import Measured
from tawin_nemo.rollout.engine import RolloutEngine
from tawin_nemo.rollout.greedy import free_beam_search, greedy_decode
from tawin_nemo.rollout.lm import LM
from tawin_nemo.types import DataParallel, TokenRows
from tawin_nemo.util.errors import DataError, TawinError
from tawin_nemo.util.log import progress

#: Rows that are decoded at once.
CHUNK_ROWS = 128

Encode = Callable[[Sequence[str]], TokenRows]
Decode = Callable[[Iterable[int]], str]


def ground(
    engine: RolloutEngine,
    samples: Samples,
    catalog: Catalog,
    answers: Sequence[str],
    encode: Encode,
    decode: Decode,
    cfg: EvalConfig,
    *,
    eos: int,
    dp: DataParallel,
    label: str,
) -> Measured:
    """``grounded_recall@K`` and ``grounded_ndcg@K`` of all rows, and ``named_ratio``; every rank returns the same.

    ``named_ratio``: the share of outputs that are, letter for letter, the answer of some item. ``answers`` are the
    items' texts as answers write them, by item index; ``encode`` turns texts into tokens as of prompts, ``decode``
    tokens into text. At most as many new tokens are written as the longest path has. Raises DataError without rows,
    TawinError for embeddings that are not numbers.
    """
    if len(samples) == 0:
        raise DataError(f"{label}: no rows to evaluate; check data.eval_limit and the split")
    dp = engine.dp or dp
    mine = np.arange(len(samples))[dp.rank :: dp.size]
    by_length = mine[np.argsort(-samples.prompts.lengths_of(mine), kind="stable")]
    chunks = [by_length[start : start + CHUNK_ROWS] for start in range(0, len(by_length), CHUNK_ROWS)]
    items_LD = embeddings(engine.lm, _first_answers(catalog, answers, encode), cfg.token_budget)
    named, place_I = set(answers), _places(catalog)
    parts = [np.zeros((0, 2), dtype=np.int64)]
    for rows in progress(chunks, what=f"{label} grounding"):
        texts = _written(engine.lm, samples.prompts.take(rows), decode, cfg.grounding, catalog.trie.max_depth, eos)
        rank_B = _ranks(engine.lm, encode(texts), items_LD, place_I[samples.target_N[rows]], cfg.token_budget)
        parts.append(np.stack([rank_B, [text in named for text in texts]], axis=1))
    gathered = dp.gather((by_length, np.concatenate(parts)))
    order = np.concatenate([rows for rows, _ in gathered]).argsort(kind="stable")
    rank_B, named_B = np.concatenate([part for _, part in gathered])[order].T
    listed_B = np.where(rank_B < 0, 0, len(items_LD))
    table = per_user_table(samples, rank_B, catalog.sharing_I[samples.target_N], listed_B, cfg)
    measured = {f"grounded_{name}": table[name].to_numpy() for name in metric_names(cfg.ks)}
    return Measured.of("grounding", samples, {**measured, "named_ratio": named_B.astype(np.float64)}, rank=rank_B)


def embeddings(lm: LM, texts: TokenRows, token_budget: int) -> Tensor:
    """The model's embedding of each of N texts (at least one token each), float64 on the CPU. [N, D].

    About ``token_budget`` tokens run at once, longest first. Raises TawinError for values that are not numbers.
    """
    order_N = np.argsort(-texts.lengths, kind="stable")
    parts, start = [], 0
    while start < len(order_N):
        fitting = max(1, token_budget // int(texts.lengths[order_N[start]]))
        part = texts.take(order_N[start : start + fitting])
        cache = lm.prefill(part)
        parts.append(lm.hidden_states(cache, torch.arange(len(part))).double().cpu())
        start += fitting
    states_ND = torch.cat(parts)[torch.from_numpy(order_N.argsort())]
    if not bool(states_ND.isfinite().all()):
        raise TawinError("the language model returned hidden states that are not numbers; look at its weights")
    return states_ND


def nearest_ranks(text_BD: Tensor, items_LD: Tensor, own_B: Tensor) -> Tensor:
    """0-based rank [B] of item ``own_B`` by distance to each text; of items at one distance the first comes first.

    >>> items_LD, text_BD = torch.tensor([[0.0], [3.0], [-1.0], [3.0]]), torch.tensor([[2.0], [2.0], [0.0]])
    >>> nearest_ranks(text_BD, items_LD, torch.tensor([3, 0, 2])).tolist()
    [1, 2, 1]
    """
    distance_BL = torch.cdist(text_BD, items_LD)
    own_B1 = distance_BL.gather(1, own_B[:, None])
    before_BL = torch.arange(len(items_LD)) < own_B[:, None]
    return ((distance_BL < own_B1) | ((distance_BL == own_B1) & before_BL)).sum(dim=1)


def _first_answers(catalog: Catalog, answers: Sequence[str], encode: Encode) -> TokenRows:
    """The tokens of each path's first item, in the order of these items."""
    first = np.unique(catalog.leaf_I, return_index=True)[1]
    return encode([answers[item] for item in np.sort(first)])


def _places(catalog: Catalog) -> np.ndarray:
    """For each item the place of its path in the order of the paths' first items. int64 [I]."""
    _, first, path_I = np.unique(catalog.leaf_I, return_index=True, return_inverse=True)
    return first.argsort().argsort()[path_I]


def _written(lm: LM, prompts: TokenRows, decode: Decode, beams: int, max_tokens: int, eos: int) -> list[str]:
    """What the model writes behind each prompt, without the end of text."""
    if beams == 1:
        rows = greedy_decode(lm, prompts, max_tokens=max_tokens, eos=eos)
        return [decode(rows[b]) for b in range(len(rows))]
    found = free_beam_search(lm, prompts, width=beams, max_tokens=max_tokens, eos=eos)
    return [decode(own[0][:-1] if own[0][-1] == eos else own[0]) for own in found]


def _ranks(lm: LM, texts: TokenRows, items_LD: Tensor, own_B: np.ndarray, token_budget: int) -> np.ndarray:
    """The rank of each row's target, -1 for a text without tokens. Every rank that shares the model calls it."""
    rank_B = np.full(len(texts), -1, dtype=np.int64)
    some = np.flatnonzero(texts.lengths)
    if len(some):
        text_BD = embeddings(lm, texts.take(some), token_budget)
        rank_B[some] = nearest_ranks(text_BD, items_LD, torch.from_numpy(own_B[some])).numpy()
    return rank_B
