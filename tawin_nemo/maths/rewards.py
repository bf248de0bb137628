"""Rewards of one prompt's candidates: rule reward, ReRe's ranking reward, dense item rewards (arXiv 2510.12211).

The dense rewards compare items by their embeddings, or by the scores of another recommender. Both are added to the rule
reward, so that the target stays the best candidate of its group; the public code of the paper trains on each of them
alone **[choice]**. The paper warns of reward hacking: a policy can raise a dense reward without returning its target
more often, by moving towards items that resemble many targets or that the other recommender scores high anyway. Watch
``rl/hit_rate`` and Recall on valid beside ``rl/reward``, and lower ``rl.reward_weight`` where only the reward rises.
Advantages are divided by the group's standard deviation: the weight decides how much a hit stands out in a group that
holds its target, but it cancels in the groups without one (most of a rollout), which learn from the dense part alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tawin_nemo.types import NO_ITEM


def rule_reward(items_BG: Tensor, target_B: Tensor) -> Tensor:
    """1 where the candidate is the target item, else 0; padding (``NO_ITEM``) gets 0. [B, G] float32.

    Items are compared by index, never by text. Items that share a token path look the same to the policy:
    name both sides by the first item of their path, or use ``Rollout.is_target_BG.float()``.

    >>> rule_reward(torch.tensor([[7, 3, -1]]), torch.tensor([3]))
    tensor([[0., 1., 0.]])
    """
    return ((items_BG == target_B.unsqueeze(-1)) & (items_BG != NO_ITEM)).float()


def ranking_reward(scores_BG: Tensor, is_target_BG: Tensor, valid_BG: Tensor | None = None) -> Tensor:
    """Rule reward plus a penalty for wrong candidates, the larger the better they rank. [B, G] in the scores' dtype.

    In a group of G candidates that holds its target, a wrong one at 0-based rank i (best score first, ties in list
    order, the target's rank counts) gets ``-(1 / log2(i + 2)) / sum_{j < G} 1 / log2(j + 2)``. A target gets 1. A
    group without target gets 0 throughout. Candidates that are not valid (padding) get 0, have no rank and are not
    among the G.

    The target is second of three, ``1/log2(2) + 1/log2(3) + 1/log2(4) = 1 + 0.6309 + 0.5 = 2.1309``:

    >>> ranking_reward(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[False, True, False]]))
    tensor([[-0.4693,  1.0000, -0.2346]])
    """
    valid_BG = torch.ones_like(is_target_BG) if valid_BG is None else valid_BG
    hit_BG = is_target_BG & valid_BG
    by_score_BG = scores_BG.detach().argsort(dim=-1, descending=True, stable=True)
    padding_last_BG = (~valid_BG).gather(-1, by_score_BG).to(torch.uint8).argsort(dim=-1, stable=True)
    rank_BG = by_score_BG.gather(-1, padding_last_BG).argsort(dim=-1)
    discount_BG = valid_BG / torch.log2(rank_BG.to(scores_BG.dtype) + 2)
    penalty_BG = discount_BG / discount_BG.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_BG.dtype).tiny)
    is_penalised_BG = hit_BG.any(-1, keepdim=True) & ~hit_BG
    return hit_BG.to(scores_BG.dtype) - penalty_BG * is_penalised_BG


def semantic_reward(
    items_BG: Tensor,
    target_B: Tensor,
    embeddings_ID: Tensor,
    *,
    is_target_BG: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Rule reward plus ``weight`` times the cosine similarity of candidate and target. [B, G], the embeddings' dtype.

    A target gets ``1 + weight``, a wrong candidate ``weight * cos(e_candidate, e_target)``, which is in
    ``[-weight, weight]`` and so always below; padding gets 0. An all-zero embedding resembles nothing: cosine 0.
    Unlike the rule reward it also differs among wrong candidates in groups without target, which makes it dense and
    open to reward hacking (see the module docstring).

    Args:
        items_BG: Item indices, ``NO_ITEM`` is padding.
        target_B: Item index of the target.
        embeddings_ID: One row per item; any length, only directions count.
        is_target_BG: bool; the candidate is the target, or is written like it (it then counts as the target). None:
            items are compared by index.
        weight: ``rl.reward_weight``.

    Raises:
        IndexError: an item has no row in ``embeddings_ID``.

    Item 1 lies at 45 degrees to the target, item 2 at 90:

    >>> vectors = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    >>> semantic_reward(torch.tensor([[0, 1, 2, -1]]), torch.tensor([0]), vectors)
    tensor([[2.0000, 0.7071, 0.0000, 0.0000]])
    """
    valid_BG = items_BG != NO_ITEM
    hit_BG = valid_BG & (items_BG == target_B.unsqueeze(-1) if is_target_BG is None else is_target_BG)
    candidate_BGD = normalize(embeddings_ID[items_BG.clamp(min=0)], dim=-1)
    target_B1D = normalize(embeddings_ID[target_B], dim=-1).unsqueeze(1)
    cosine_BG = (candidate_BGD * target_B1D).sum(-1)
    return torch.where(hit_BG, 1.0 + weight, weight * cosine_BG) * valid_BG


def collaborative_reward(scores_BI: Tensor, items_BG: Tensor, is_target_BG: Tensor, *, weight: float = 1.0) -> Tensor:
    """Rule reward plus ``weight`` times a sequential recommender's probability of the candidate. [B, G], scores' dtype.

    ``scores_BI`` are the recommender's raw scores of all items for each prompt's history (logits). ReRe uses the raw
    logit, whose scale depends on how the recommender was trained and which easily outweighs the 1 of a hit. Here it is
    the softmax of the scores over the group's valid candidates **[choice]**: the probability that the recommender
    gives to a candidate, knowing that it is one of the group. It is in [0, 1], keeps small differences small, and does
    not change when all scores shift. A wrong candidate gets at most ``weight``, a target at least 1: below
    ``weight = 1`` none can reach the target, at 1 it can at most draw level, above 1 the recommender may overrule the
    target. Candidates drawn several times count several times in the softmax. Padding gets 0.

    Besides reward hacking (see the module docstring) this reward can leak targets: a recommender trained
    on the rows that RL uses has seen their targets.

    Args:
        scores_BI: Scores of items 0 .. I - 1; -inf where the recommender lists an item not at all, which adds 0.
        items_BG: Item indices, ``NO_ITEM`` is padding.
        is_target_BG: bool; the candidate is the target, or is written like it.
        weight: ``rl.reward_weight``.

    The target and one other candidate share the probability 1 / 2 each, the padding is out:

    >>> scores = torch.tensor([[0.3, 5.0, 0.3]])
    >>> collaborative_reward(scores, torch.tensor([[0, 2, -1]]), torch.tensor([[False, True, False]]), weight=0.5)
    tensor([[0.2500, 1.2500, 0.0000]])
    """
    valid_BG = items_BG != NO_ITEM
    score_BG = scores_BI.gather(-1, items_BG.clamp(min=0)).masked_fill(~valid_BG, -torch.inf)
    unknown_B1 = (score_BG == -torch.inf).all(-1, keepdim=True)  # a softmax over nothing is not a number
    share_BG = score_BG.masked_fill(unknown_B1, 0.0).softmax(-1).masked_fill(unknown_B1, 0.0)
    return torch.where(valid_BG, is_target_BG + weight * share_BG, 0.0)
