"""A search that an auxiliary recommender joins: D3 (Decoding Matters, arXiv 2406.14900).

Every edge of the trie that is taken at a choice counts ``a log p_LLM + (1 - a) log p_aux``. ``p_aux`` of an edge is the
auxiliary recommender's probability of the items below it, divided by that of the items below the node it leaves: its
softmax over the whole catalog, walked down the trie. Tokens without a choice ("ghost" tokens) cost nothing, and the
score is not normalised by length: both are so without an auxiliary recommender as well. The sum over a path is
therefore ``a`` times the path's log-prob in trie space plus ``(1 - a) log p_aux(the items on the path)``.

``Candidates.logprobs_BWT`` stay those of the language model; only scores, and so ranks, are mixed.

P prompts of the model's cache, D distinct paths, V node ids of the trie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.lazy_rows import TokenSource
from tawin_nemo.types import PromptRecord, TokenRows
from tawin_nemo.util.errors import TawinError


@dataclass(frozen=True)
class Assist(PromptRecord):
    """What the auxiliary recommender says about the trie's edges, for each of P prompts."""

    weight_P: Tensor  # the language model's share a; 1 = the prompt is searched without assistance
    edge_PV: Tensor  # log p_aux of the edge into each node, at most 0; 0 where a is 1

    def __len__(self) -> int:
        return len(self.weight_P)

    @classmethod
    def of(cls, trie: TokenTrie, scores_PI: Tensor, weight: float) -> Assist:
        """Of the auxiliary recommender's scores for the trie's items, on the CPU. Errors: ``edge_logprobs``."""
        weight_P = torch.full((len(scores_PI),), weight, dtype=torch.float64)
        return cls(weight_P, torch.from_numpy(edge_logprobs(trie, scores_PI.double().numpy())))

    @classmethod
    def none(cls, count: int, trie: TokenTrie) -> Assist:
        """For ``count`` prompts without assistance; their scores are what they are without ``Assist``."""
        zeros_PV = torch.zeros(count, trie.num_nodes, dtype=torch.float64)
        return cls(torch.ones(count, dtype=torch.float64), zeros_PV)

    def mixed(self, prompt_E: Tensor, node_E: Tensor, logp_E: Tensor) -> Tensor:
        """``a log p_LLM + (1 - a) log p_aux`` of the edges into ``node_E``, for prompts ``prompt_E``; any shape.

        An edge whose ``logp_E`` is -inf (impossible, or blocked by a filter) stays impossible whatever ``a`` is.
        """
        row = prompt_E * self.edge_PV.shape[1] + node_E
        aux_E = self.edge_PV.view(-1).index_select(0, row.reshape(-1)).view_as(logp_E)
        weight_E = self.weight_P.index_select(0, prompt_E.reshape(-1)).view_as(logp_E)
        mixed_E = weight_E * logp_E + (1 - weight_E) * aux_E
        return torch.where(logp_E == -torch.inf, logp_E, mixed_E)

    def forced(self, prompt_B: Tensor, logp_BW: Tensor) -> Tensor:
        """The model's share of tokens without a choice, which cost something in vocab space only."""
        return self.weight_P.index_select(0, prompt_B)[:, None] * logp_BW


#: Least score of an item, counted from the best one's: e to this power is still a normal number of float64.
LEAST = -700.0

#: Makes the assistance of a search for users with these histories (item indices, oldest first).
Assistant = Callable[[TokenRows], Assist]


def joined(
    present: Assist | None, prompts: int, new: Assist | None, added: int, trie: TokenTrie, like: Tensor
) -> Assist | None:
    """The assistance of ``prompts`` prompts in the model's cache and of ``added`` behind them; None if none has any.

    In the device and the floating type of ``like``.
    """
    present = present if prompts else None
    if present is None and new is None:
        return None
    new = (new if new is not None else Assist.none(added, trie)).map(lambda tensor: tensor.to(like))
    if not prompts:
        return new
    first = present if present is not None else Assist.none(prompts, trie).map(lambda tensor: tensor.to(like))
    return Assist.cat([first, new])


def edge_logprobs(trie: TokenTrie, scores_BI: np.ndarray) -> np.ndarray:
    """Log-prob of the edge into every node under a softmax of B rows of scores, walked down the trie. [B, V] float64.

    0 for the root and for node ids that are not used. The mass below a node is summed from its children's, deepest
    nodes first: a difference of running sums over the sorted catalog would be one pass, but leaves nothing of an item
    that is 1e-16 times as likely as all before it. No item is impossible unless its score is -inf (``LEAST``). Raises
    TawinError for scores that are not numbers.
    """
    if not np.isfinite(scores_BI.max(axis=1)).all():
        raise TawinError("rollout.assist.stage: the auxiliary recommender's scores are not numbers; train it again")
    arrays, inner = trie.arrays, trie.num_inner
    below_BI = scores_BI - scores_BI.max(axis=1, keepdims=True)
    below_BI = np.where(below_BI > -np.inf, np.maximum(below_BI, LEAST), -np.inf)
    share_BI = np.exp(below_BI)[:, arrays.node_item[inner:]]
    first_D = np.flatnonzero(arrays.node_depth[inner:])  # items of one path are neighbours
    mass_BV = np.zeros((len(scores_BI), trie.num_nodes))
    mass_BV[:, inner + first_D] = np.add.reduceat(share_BI, first_D, axis=1)
    offsets, children = arrays.child_offsets.astype(np.int64), arrays.child_nodes.astype(np.int64)
    borders = np.flatnonzero(np.diff(arrays.node_depth[:inner].astype(np.int64))) + 1  # inner nodes: ordered by depth
    levels = np.concatenate([[0], borders, [inner]])
    for low, high in zip(levels[-2::-1], levels[:0:-1], strict=True):
        if high > low:
            below_BE = mass_BV[:, children[offsets[low] : offsets[high]]]
            mass_BV[:, low:high] = np.add.reduceat(below_BE, offsets[low:high] - offsets[low], axis=1)
    edge_BV = np.zeros_like(mass_BV)
    if inner:
        parent_E = np.repeat(np.arange(inner), np.diff(offsets))
        with np.errstate(divide="ignore"):  # a mass of 0 is impossible: -inf
            share_BE = np.log(mass_BV[:, children]) - np.log(np.maximum(mass_BV[:, parent_E], np.finfo(float).tiny))
        edge_BV[:, children] = np.minimum(share_BE, 0.0)
    return edge_BV


def histories_for(engine: object, histories: TokenSource, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Keyword ``histories`` of a search (for some rows of them) where the engine has an assistant, else nothing."""
    if getattr(engine, "assistant", None) is None:
        return {}
    return {"histories": histories if rows is None else histories.take(rows)}
