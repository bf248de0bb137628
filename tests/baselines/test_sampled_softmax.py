"""Sampled softmax against its definition, and with logQ correction against the full softmax that it estimates."""

import math

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.protocol import softmax_loss
from tawin_nemo.baselines.sampled_softmax import NegativeSampler, SharedNegatives, sampled_softmax_loss
from tests.baselines.patterns import ITEMS, model_of

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("corrected", [False, True])
def test_the_loss_is_that_of_its_definition(corrected):
    draw = torch.Generator().manual_seed(2)
    scores_MI = torch.randn(5, 6, generator=draw, dtype=torch.float64)
    target_M, items_N = torch.tensor([0, 2, 5, 2, 1]), torch.tensor([2, 2, 5, 4])
    expected_I = torch.rand(6, generator=draw, dtype=torch.float64)
    negatives = SharedNegatives(items_N, expected_I.log() if corrected else None)
    own_M = scores_MI.gather(1, target_M.unsqueeze(1)).squeeze(1)
    loss_M = sampled_softmax_loss(own_M, scores_MI[:, items_N], target_M, negatives)
    for row, target in enumerate(target_M.tolist()):
        total = own = math.exp(scores_MI[row, target])
        for item in items_N.tolist():
            if item != target:
                total += math.exp(scores_MI[row, item]) / (float(expected_I[item]) if corrected else 1.0)
        assert float(loss_M[row]) == pytest.approx(-math.log(own / total), rel=1e-10)


@pytest.mark.parametrize("popularity", [False, True])
def test_corrected_negatives_as_frequent_as_expected_give_the_full_softmax(popularity):
    """Each item is drawn exactly as often as its probability says: the estimate of the denominator is exact then."""
    count_I = np.array([4, 1, 2, 1]) if popularity else np.ones(4)
    sampler = NegativeSampler.of(count_I, 16, popularity=popularity, logq=True)
    times_I = (16 * sampler.q_I).round().long()
    negatives = SharedNegatives(torch.arange(4).repeat_interleave(times_I), sampler.draw().log_expected_I.double())
    scores_MI = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    target_M = torch.tensor([0, 1, 2, 3, 0, 0, 2])
    own_M = scores_MI.gather(1, target_M.unsqueeze(1)).squeeze(1)
    loss_M = sampled_softmax_loss(own_M, scores_MI[:, negatives.items_N], target_M, negatives)
    full_M = softmax_loss(scores_MI, target_M)
    torch.testing.assert_close(loss_M, full_M, rtol=1e-6, atol=1e-6)  # log(N q) is float32
    ours, theirs = (torch.autograd.grad(loss.sum(), scores_MI, retain_graph=True)[0] for loss in (loss_M, full_M))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_draws_follow_the_probabilities_and_the_seed():
    count_I = np.array([0, 6, 3, 1])
    torch.manual_seed(4)
    items_N = NegativeSampler.of(count_I, 20_000, popularity=True, logq=False).draw().items_N
    share_I = np.bincount(items_N.numpy(), minlength=4) / 20_000
    assert share_I[0] == 0
    assert np.abs(share_I - count_I / 10).max() < 0.02
    torch.manual_seed(4)
    uniform = NegativeSampler.of(count_I, 20_000, popularity=False, logq=False)
    first = uniform.draw().items_N
    assert np.abs(np.bincount(first.numpy(), minlength=4) / 20_000 - 0.25).max() < 0.02
    torch.manual_seed(4)
    assert torch.equal(uniform.draw().items_N, first)


@pytest.mark.parametrize("name", ["gru4rec", "caser", "sasrec"])
def test_a_model_scores_shared_negatives_as_it_scores_all_items(name):
    model = model_of(name).eval().double()
    history_BL, target_B = torch.tensor([[1, 2], [7, 3], [0, 5]]), torch.tensor([3, 4, 3])
    negatives = SharedNegatives(torch.tensor([3, 0, ITEMS - 1]))
    scores_BI = model.scores(history_BL)
    own_B = scores_BI.gather(1, target_B.unsqueeze(1)).squeeze(1)
    expected_B = sampled_softmax_loss(own_B, scores_BI[:, negatives.items_N], target_B, negatives)
    torch.testing.assert_close(model.loss(history_BL, target_B, negatives), expected_B, **CLOSE)
