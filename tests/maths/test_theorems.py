"""The propositions of TAWin (arXiv 2604.22504) as tests of this package's own functions.

Lemma 3.1: GRPO is a pairwise objective. Prop. H.1: the
ranking reward is a reweighting. Eq. 22: TAWin's weights turn the pairwise objective into that of WPAUC's window.
Everything is in float64; expectations are exact sums over a catalog small enough to be listed.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tawin_nemo.maths.advantages import group_advantages
from tawin_nemo.maths.auc import recall_window, window_ranks, wpauc
from tawin_nemo.maths.policy_loss import PolicyTerms, clipped_surrogate, sequence_mean
from tawin_nemo.maths.rewards import ranking_reward, rule_reward
from tawin_nemo.maths.segments import segment_log_softmax
from tawin_nemo.maths.tawin import tawin_weights

EPS = 0.2  # the clip of GRPO on both sides
EXACT = {"rtol": 0.0, "atol": 1e-12}


# -- Lemma 3.1 -------------------------------------------------------------------------------------------------------
# A catalog as a prefix tree: items of 2 to 4 tokens, every token an edge; siblings share a normalisation.
PATHS = ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0, 0), (2, 0, 1), (2, 1, 0, 0), (2, 1, 0, 1), (2, 2), (3, 0, 0))
EDGES = sorted({path[: t + 1] for path in PATHS for t in range(len(path))}, key=lambda edge: (len(edge), edge))
PARENTS = [edge[:-1] for edge in EDGES]
SEGMENT_E = torch.tensor([list(dict.fromkeys(PARENTS)).index(parent) for parent in PARENTS])
LENGTH_M = torch.tensor([len(path) for path in PATHS])
CANDIDATE_N = torch.repeat_interleave(torch.arange(len(PATHS)), LENGTH_M)
EDGE_N = torch.tensor([EDGES.index(path[: t + 1]) for path in PATHS for t in range(len(path))])
HIT_M = torch.tensor([m in (1, 6) for m in range(len(PATHS))])


def token_logprobs(logits_E: Tensor) -> Tensor:
    """Log-probs of all tokens of all items, item after item; a forced token has exactly 0."""
    return segment_log_softmax(logits_E, SEGMENT_E, int(SEGMENT_E.max()) + 1)[EDGE_N]


def per_item(values_N: Tensor) -> Tensor:
    return torch.zeros(len(PATHS), dtype=values_N.dtype).index_add(0, CANDIDATE_N, values_N)


def counted_policy(seed: int) -> tuple[Tensor, Tensor]:
    """A policy whose item probabilities are whole numbers over their sum: ``old_logp_N`` and the numbers."""
    count_M = torch.randint(1, 7, (len(PATHS),), generator=torch.Generator().manual_seed(seed))
    below_E = [sum(int(c) for c, p in zip(count_M, PATHS, strict=True) if p[: len(e)] == e) for e in EDGES]
    old_logp_N = token_logprobs(torch.tensor(below_E, dtype=torch.float64).log())
    torch.testing.assert_close(per_item(old_logp_N).exp(), count_M / count_M.sum().double(), **EXACT)
    return old_logp_N, count_M


def objective(logp_N: Tensor, terms: PolicyTerms, num_candidates: float) -> Tensor:
    """TAWin's objective (Eq. 22) without KL, from the pieces that the training loss is made of."""
    ratio_N = torch.exp(logp_N - terms.old_logp_N)
    surrogate_N = clipped_surrogate(ratio_N, terms.advantage_M[terms.candidate_N], EPS, EPS)
    return sequence_mean(
        terms.omega_M[terms.candidate_N] * surrogate_N, terms.candidate_N, terms.length_M, num_candidates
    )


def pairwise_form(logp_N: Tensor, old_logp_N: Tensor, q_M: Tensor) -> Tensor:
    """sqrt(p (1 - p)) E[s+(y+) - s-(y-)] by a loop over all (hit, miss) pairs."""
    ratio_N = torch.exp(logp_N - old_logp_N)
    of_item = [ratio_N[m == CANDIDATE_N] for m in range(len(PATHS))]
    hits, misses = HIT_M.nonzero().flatten().tolist(), (~HIT_M).nonzero().flatten().tolist()
    p = sum(q_M[m] for m in hits)
    total = torch.zeros((), dtype=torch.float64)
    for plus in hits:
        for minus in misses:
            s_plus = torch.stack([torch.clamp(rho, max=1 + EPS) for rho in of_item[plus]]).mean()
            s_minus = torch.stack([torch.clamp(rho, min=1 - EPS) for rho in of_item[minus]]).mean()
            total = total + q_M[plus] / p * q_M[minus] / (1 - p) * (s_plus - s_minus)
    return (p * (1 - p)).sqrt() * total


def new_logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(EDGES), generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("seed", range(6))
def test_lemma_3_1_values_and_gradients(seed: int) -> None:
    """The group is the policy itself: every item as often as its probability says, so its mean is the expectation."""
    old_logp_N, count_M = counted_policy(seed)
    logits_E = new_logits(seed + 100)
    logp_N = token_logprobs(logits_E)

    G = int(count_M.sum())
    member_G = torch.repeat_interleave(torch.arange(len(PATHS)), count_M)  # item of each candidate
    tokens_GN = [(m == CANDIDATE_N).nonzero().flatten() for m in member_G.tolist()]
    advantage_BG = group_advantages(HIT_M[member_G].double().unsqueeze(0), eps=0.0)
    token = torch.cat(tokens_GN)
    terms = PolicyTerms(
        candidate_N=torch.repeat_interleave(torch.arange(G), LENGTH_M[member_G]),
        old_logp_N=old_logp_N[token],
        ref_logp_N=None,
        advantage_M=advantage_BG[0],
        omega_M=torch.ones(G, dtype=torch.float64),
        length_M=LENGTH_M[member_G],
    )
    grpo = objective(logp_N[token], terms, G)
    pairs = pairwise_form(logp_N, old_logp_N, count_M / count_M.sum().double())
    torch.testing.assert_close(grpo, pairs, **EXACT)
    (grpo_E,) = torch.autograd.grad(grpo, logits_E, retain_graph=True)
    (pairs_E,) = torch.autograd.grad(pairs, logits_E)
    torch.testing.assert_close(grpo_E, pairs_E, **EXACT)
    assert grpo_E.abs().max() > 1e-3
    ratio_N = torch.exp(logp_N - old_logp_N)
    hit_N = HIT_M[CANDIDATE_N]
    assert (ratio_N > 1 + EPS)[hit_N].any() or (ratio_N < 1 - EPS)[~hit_N].any()  # the clip takes part


def test_lemma_3_1_at_the_first_update_is_a_pairwise_policy_gradient() -> None:
    """At rho = 1 both sides are 0 and the gradient is sqrt(p (1 - p)) E[mean_t dlogp(y+) - mean_t dlogp(y-)]."""
    logits_E = new_logits(4)
    logp_N = token_logprobs(logits_E)
    q_M = per_item(logp_N).exp().detach()
    p = q_M[HIT_M].sum()
    advantage_M = (HIT_M.double() - p) / (p * (1 - p)).sqrt()
    # omega = probability: the sum over the catalog is the expectation over rollouts
    terms = PolicyTerms(CANDIDATE_N, logp_N.detach(), None, advantage_M, q_M, LENGTH_M)
    grpo = objective(logp_N, terms, 1)
    assert grpo.item() == pytest.approx(0, abs=1e-12)
    mean_M = per_item(logp_N) / LENGTH_M
    expected = (p * (1 - p)).sqrt() * ((q_M * mean_M)[HIT_M].sum() / p - (q_M * mean_M)[~HIT_M].sum() / (1 - p))
    (grpo_E,) = torch.autograd.grad(grpo, logits_E, retain_graph=True)
    (expected_E,) = torch.autograd.grad(expected, logits_E)
    torch.testing.assert_close(grpo_E, expected_E, **EXACT)
    assert grpo_E.abs().max() > 1e-3


# -- Proposition H.1 -------------------------------------------------------------------------------------------------
@settings(max_examples=150)
@given(st.integers(2, 20), st.integers(0, 2**31), st.data())
def test_prop_h1_ranking_reward_is_a_reweighting_of_the_rule_reward(G: int, seed: int, data: st.DataObject) -> None:
    """w_+ = (G - 1 + P) / (G - 1), w_j = G p_j + 1 - P, all positive; after division by the group's standard deviation
    up to one factor per group; and so for the clipped objective and its gradient, off-policy too."""
    generator = torch.Generator().manual_seed(seed)
    scores_BG = torch.randint(0, 2 * G, (1, G), generator=generator).double()  # some ties
    items_BG = torch.randperm(G, generator=generator).unsqueeze(0)
    target = data.draw(st.integers(0, G - 1))
    rule_BG = rule_reward(items_BG, torch.tensor([target])).double()
    is_target_BG = rule_BG > 0
    ranking_BG = ranking_reward(scores_BG, is_target_BG)
    penalty_BG = rule_BG - ranking_BG
    P = penalty_BG.sum()
    weight_BG = torch.where(is_target_BG, (G - 1 + P) / (G - 1), G * penalty_BG + 1 - P)
    assert (weight_BG > 0).all()

    rule_adv_BG, ranking_adv_BG = (group_advantages(r_BG, eps=0.0) for r_BG in (rule_BG, ranking_BG))
    rule_std, ranking_std = rule_BG.std(correction=0), ranking_BG.std(correction=0)
    torch.testing.assert_close(ranking_adv_BG * ranking_std, weight_BG * rule_adv_BG * rule_std, rtol=0, atol=1e-10)

    logp_N = torch.randn(G, generator=generator, dtype=torch.float64).requires_grad_()
    old_logp_N = (logp_N + 0.3 * torch.randn(G, generator=generator, dtype=torch.float64)).detach()
    ones = torch.ones(G, dtype=torch.float64)
    common = (torch.arange(G), old_logp_N, None)
    reward_side = objective(logp_N, PolicyTerms(*common, ranking_adv_BG[0], ones, ones), G) * ranking_std
    weight_side = objective(logp_N, PolicyTerms(*common, rule_adv_BG[0], weight_BG[0], ones), G) * rule_std
    torch.testing.assert_close(reward_side, weight_side, rtol=0, atol=1e-10)
    (reward_N,) = torch.autograd.grad(reward_side, logp_N, retain_graph=True)
    (weight_N,) = torch.autograd.grad(weight_side, logp_N)
    torch.testing.assert_close(reward_N, weight_N, rtol=0, atol=1e-10)


# -- Eq. 22: the weighted objective aims at the window ---------------------------------------------------------------
# The whole catalog is the group: 24 items of one token, scores = log-probs of one softmax, one of them the target.
ITEMS, TARGET_RANK = 24, 9
N_NEG = ITEMS - 1


def catalog(seed: int) -> tuple[Tensor, Tensor]:
    """Logits with gradient, and the mask of the target, which ranks at ``TARGET_RANK``."""
    logits_G = torch.randn(ITEMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    is_target_G = torch.zeros(ITEMS, dtype=torch.bool)
    is_target_G[logits_G.argsort(descending=True)[TARGET_RANK]] = True
    return logits_G.requires_grad_(), is_target_G


def tawin_objective(logp_G: Tensor, old_logp_G: Tensor, is_target_G: Tensor, **window: float | str) -> Tensor:
    """The objective of one group, weights from the rollout's scores; no window = plain GRPO."""
    advantage_BG = group_advantages(is_target_G.double().unsqueeze(0), eps=0.0)
    omega_G = torch.ones_like(logp_G)
    if window:
        omega_G = tawin_weights(old_logp_G.unsqueeze(0), is_target_G.unsqueeze(0), **window)[0]
    terms = PolicyTerms(torch.arange(ITEMS), old_logp_G, None, advantage_BG[0], omega_G, torch.ones(ITEMS))
    return objective(logp_G, terms, ITEMS)


def negatives_by_rank(logp_G: Tensor, is_target_G: Tensor) -> Tensor:
    """Places of the negatives, best score first."""
    order = logp_G.detach().argsort(descending=True)
    return order[~is_target_G[order]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("anchor", "k"), [(0, 1), (0, 4), (2, 4), (7, 3), (20, 3), (0, N_NEG)])
def test_tawin_at_small_tau_is_the_pairwise_objective_of_the_wpauc_window(seed: int, anchor: int, k: int) -> None:
    """Values and gradients, off-policy: sqrt(p (1 - p)) (s+ - mean of s- over the negatives that WPAUC counts)."""
    logits_G, is_target_G = catalog(seed)
    old_logp_G = logits_G.detach().log_softmax(-1)
    moved = torch.randn(ITEMS, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    logp_G = (logits_G + 0.5 * moved).log_softmax(-1)
    tawin = tawin_objective(logp_G, old_logp_G, is_target_G, k=k, tau=1e-6, anchor=anchor, window="start")

    start, end = window_ranks(anchor / N_NEG, k / N_NEG, N_NEG)
    assert (start, end) == (anchor, anchor + k)
    inside = negatives_by_rank(old_logp_G, is_target_G)[start:end]
    ratio_G = torch.exp(logp_G - old_logp_G)
    p = 1 / ITEMS
    s_plus = ratio_G[is_target_G].clamp(max=1 + EPS).sum()
    pairs = (p * (1 - p)) ** 0.5 * (s_plus - ratio_G[inside].clamp(min=1 - EPS).mean())
    torch.testing.assert_close(tawin, pairs, rtol=0, atol=1e-12)
    (tawin_G,) = torch.autograd.grad(tawin, logits_G, retain_graph=True)
    (pairs_G,) = torch.autograd.grad(pairs, logits_G)
    torch.testing.assert_close(tawin_G, pairs_G, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("anchor", "k", "window"), [(2, 4, "start"), (7, 3, "start"), (6, 3, "centred"), (0, 1, "centred")]
)
def test_the_gradient_moves_negatives_inside_the_window_only(anchor: int, k: int, window: str) -> None:
    """At the first update. The mean weight 1 of the negatives makes the weighted advantages sum to 0, so the softmax
    hands nothing on: not only the log-probs but the logits of all other negatives stay where they are."""
    first = anchor if window == "start" else anchor - (k - 1) // 2
    for seed in range(5):
        logits_G, is_target_G = catalog(seed)
        logp_G = logits_G.log_softmax(-1)
        value = tawin_objective(logp_G, logp_G.detach(), is_target_G, k=k, tau=1e-6, anchor=anchor, window=window)
        (push_G,) = torch.autograd.grad(value, logits_G)
        by_rank = push_G[negatives_by_rank(logp_G, is_target_G)]
        inside = torch.zeros(N_NEG, dtype=torch.bool)
        inside[first : first + k] = True
        advantage = (1 / N_NEG) ** 0.5  # of a miss: sqrt(p / (1 - p)), p = 1 / ITEMS
        expected = torch.full((k,), -advantage * N_NEG / k / ITEMS, dtype=torch.float64)
        torch.testing.assert_close(by_rank[inside], expected, **EXACT)
        assert by_rank[~inside].abs().max() < 1e-15
        assert push_G[is_target_G].item() == pytest.approx(N_NEG**0.5 / ITEMS, abs=1e-12)


def test_plain_grpo_moves_every_negative_and_the_window_sharpens_with_tau() -> None:
    logits_G, is_target_G = catalog(0)
    logp_G = logits_G.log_softmax(-1)

    def share_outside(**window: float | str) -> float:
        value = tawin_objective(logp_G, logp_G.detach(), is_target_G, **window)
        push_G = torch.autograd.grad(value, logits_G, retain_graph=True)[0].abs()
        by_rank = push_G[negatives_by_rank(logp_G, is_target_G)]
        return ((by_rank.sum() - by_rank[2:6].sum()) / by_rank.sum()).item()

    shares = [share_outside(k=4, tau=tau, anchor=2, window="start") for tau in (1e6, 1.0, 0.1, 0.03, 0.003)]
    assert share_outside() == pytest.approx(1 - 4 / N_NEG)
    assert shares[0] == pytest.approx(1 - 4 / N_NEG, abs=1e-4)
    assert all(wide > narrow for wide, narrow in itertools.pairwise(shares))
    assert shares[-1] < 1e-6


def test_raising_the_target_through_the_window_raises_wpauc_and_recall() -> None:
    """Ascent along the objective aimed at K lifts the target to rank K - 1; the metric it aims at becomes 1."""
    k = 4
    logits_G, is_target_G = catalog(1)
    window = recall_window(k, 1, N_NEG)
    before = wpauc(logits_G.detach()[is_target_G], logits_G.detach()[~is_target_G], *window)
    for _ in range(200):
        logp_G = logits_G.log_softmax(-1)
        value = tawin_objective(logp_G, logp_G.detach(), is_target_G, k=1, tau=1e-6, anchor=k - 1)
        (push_G,) = torch.autograd.grad(value, logits_G)
        logits_G = (logits_G.detach() + 0.1 * push_G).requires_grad_()
    pos, neg = logits_G.detach()[is_target_G], logits_G.detach()[~is_target_G]
    assert before == 0
    assert wpauc(pos, neg, *window) == 1
    assert (neg > pos).sum() < k
