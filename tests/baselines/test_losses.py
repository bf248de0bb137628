"""Values and gradients of the losses against their formulas, and what may be drawn as a negative."""

import math

import pytest
import torch

from tawin_nemo.baselines.protocol import bce_loss, sample_negatives, softmax_loss


def test_softmax_loss_and_its_gradient():
    scores_BI = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    loss_B = softmax_loss(scores_BI, torch.tensor([1, 0]))
    for row, target in enumerate((1, 0)):
        weights = [math.exp(value) for value in scores_BI[row].tolist()]
        assert loss_B[row].item() == pytest.approx(-math.log(weights[target] / sum(weights)))
    loss_B[1].backward()
    total = 2 + math.exp(3)
    torch.testing.assert_close(
        scores_BI.grad[1], torch.tensor([1 / total - 1, 1 / total, math.exp(3) / total], dtype=torch.float64)
    )
    assert scores_BI.grad[0].abs().max() == 0


def test_bce_loss_and_its_gradient():
    positive_B = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    negatives_BN = torch.tensor([[1.0, -1.0], [0.5, 4.0]], dtype=torch.float64, requires_grad=True)
    loss_B = bce_loss(positive_B, negatives_BN)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for row in range(2):
        misses = [math.log(1 - sigmoid(value)) for value in negatives_BN[row].tolist()]
        assert loss_B[row].item() == pytest.approx(-math.log(sigmoid(positive_B[row].item())) - sum(misses) / 2)
    loss_B.sum().backward()
    expected = [[sigmoid(value) / 2 for value in row] for row in negatives_BN.tolist()]
    torch.testing.assert_close(negatives_BN.grad, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        positive_B.grad, torch.tensor([sigmoid(value) - 1 for value in positive_B.tolist()], dtype=torch.float64)
    )


def test_bce_survives_extreme_scores():
    loss_B = bce_loss(torch.tensor([-200.0]), torch.tensor([[200.0]]))
    assert loss_B.item() == pytest.approx(400.0)


def test_negatives_are_all_other_items_equally_often():
    torch.manual_seed(0)
    target_B = torch.tensor([0, 2, 4])
    draws_BN = sample_negatives(target_B, 5, 20_000)
    for row, target in enumerate(target_B.tolist()):
        counts_I = torch.bincount(draws_BN[row], minlength=5).double() / 20_000
        assert counts_I[target] == 0
        others_I = counts_I[torch.arange(5) != target]
        assert (others_I - 0.25).abs().max() < 0.02


def test_one_item_has_no_negatives():
    with pytest.raises(ValueError, match="second item"):
        sample_negatives(torch.tensor([0]), 1, 1)
