"""NAPO's sharing and margin (Eq. 13-17) against loops; the group of 16 that the paper's numbers imply."""

from __future__ import annotations

import pytest
import torch

from tawin_nemo.maths.dynamic_margin import confidence, dynamic_margin, next_baseline
from tawin_nemo.maths.negative_sharing import NO_ROW, num_similar, shared_mask, shared_values, similar_rows
from tawin_nemo.maths.preference_loss import napo_loss

B, N, D = 7, 3, 4


def test_the_papers_numbers_of_effective_negatives():
    """3 own negatives become 33 and 19 become 209: both say that 10 rows share, which only b = 16 gives."""
    assert 3 * (1 + num_similar(16, 0.7)) == 33
    assert 19 * (1 + num_similar(16, 0.7)) == 209
    assert [b for b in range(1, 257) if num_similar(b, 0.7) == 10] == [16]


@pytest.mark.parametrize("group", [1, 2, 5, 16, 128])
def test_rho_runs_from_nobody_to_everybody(group):
    assert num_similar(group, 0.0) == 0
    assert num_similar(group, 1.0) == group - 1


@pytest.mark.parametrize("similar", [0, 2, B - 1])
def test_similar_rows_are_those_with_the_largest_inner_product(similar):
    state_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = similar_rows(state_BD, similar)
    assert found.shape == (B, similar + 1)
    for b in range(B):
        scores = {other: float(state_BD[b] @ state_BD[other]) for other in range(B) if other != b}
        expected = sorted(scores, key=lambda other: -scores[other])[:similar]
        assert found[b].tolist() == [b, *expected]


def test_equal_states_take_the_first_rows():
    assert similar_rows(torch.ones(4, 2), 2).tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1]]


def test_sharing_keeps_gradients_and_leaves_out_what_is_forbidden():
    """NAPO on shared rewards against the double sum of Eq. 14, gradient of a shared reward in every row included."""
    generator = torch.Generator().manual_seed(2)
    h_pos_B = torch.randn(B, generator=generator, dtype=torch.float64)
    h_neg_BN = torch.randn(B, N, generator=generator, dtype=torch.float64).requires_grad_()
    mask_BN = torch.rand(B, N, generator=generator) < 0.8
    mask_BN[:, 0] = True
    source_BK = similar_rows(torch.randn(B, D, generator=generator), 3)
    source_BK[4, 2:] = NO_ROW
    forbidden_BKN = torch.rand(*source_BK.shape, N, generator=generator) < 0.2
    forbidden_BKN[:, 0] = False
    ours = napo_loss(
        h_pos_B, shared_values(h_neg_BN, source_BK), shared_mask(mask_BN, source_BK, forbidden_BKN), 0.5
    ).sum()
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        total = torch.zeros((), dtype=torch.float64)
        for place, other in enumerate(source_BK[b].tolist()):
            for n in range(N):
                if other != NO_ROW and mask_BN[other, n] and not forbidden_BKN[b, place, n]:
                    total = total + torch.exp(h_neg_BN[other, n] - h_pos_B[b])
        expected = expected + torch.log(1 + total * torch.exp(torch.tensor(0.5, dtype=torch.float64)))
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-12)
    mine, theirs = (torch.autograd.grad(loss, h_neg_BN)[0] for loss in (ours, expected))
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-12)


def test_confidence_and_margin():
    score = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    assert confidence(score).tolist() == [1.0, 0.5, 0.0]
    surer = dynamic_margin(0.8, 0.5, gamma0=1.0, alpha=0.3)
    assert surer == pytest.approx(1.09)
    assert dynamic_margin(0.2, 0.5, gamma0=1.0, alpha=0.3) < 1.0 < surer
    assert dynamic_margin(0.8, 0.5, gamma0=1.7, alpha=0.0) == 1.7


def test_the_baseline_is_a_moving_average_of_batch_means():
    means, baseline = [0.5, 0.7, 0.2, 0.9], None
    for mean in means:
        baseline = next_baseline(baseline, mean, momentum=0.9)
    by_hand = 0.9**3 * 0.5 + 0.1 * (0.9**2 * 0.7 + 0.9 * 0.2 + 0.9)
    assert baseline == pytest.approx(by_hand, rel=1e-12)
