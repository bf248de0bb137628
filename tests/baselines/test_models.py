"""What holds for all of them: shapes, no influence of padding, order matters, a rule in the data is learned."""

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.build import Blueprint, build_recommender
from tawin_nemo.baselines.protocol import bce_loss, left_aligned, left_padded, sample_negatives, softmax_loss
from tawin_nemo.baselines.sampled_softmax import NegativeSampler
from tawin_nemo.config.schema import BaselineConfig
from tawin_nemo.types import NO_ITEM, TokenRows
from tawin_nemo.util.errors import ConfigError
from tests.baselines.patterns import ITEMS, MODELS, PATHS, WINDOW, histories, model_of, successors

EMBEDDED = [name for name in MODELS if name != "tiger"]


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_losses_have_one_value_per_item_and_row(name):
    model = model_of(name).eval()
    history_BL = left_padded(histories(7, seed=1))
    assert model.scores(history_BL).shape == (7, ITEMS)
    loss_B = model.loss(history_BL, torch.arange(7))
    assert loss_B.shape == (7,)
    assert (loss_B > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_padding_has_no_influence(name):
    model = model_of(name).eval()
    rows, targets = histories(9, seed=2), torch.arange(9)
    together_BL = left_padded(rows)
    wider_BL = torch.cat([torch.full((9, 3), NO_ITEM), together_BL], dim=1)
    expected = model.scores(together_BL)
    torch.testing.assert_close(model.scores(wider_BL), expected)
    torch.testing.assert_close(model.loss(wider_BL, targets), model.loss(together_BL, targets))
    for row in range(9):
        alone_1L = left_padded(rows.take([row]))
        torch.testing.assert_close(model.scores(alone_1L)[0], expected[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            model.loss(alone_1L, targets[row : row + 1])[0], model.loss(together_BL, targets)[row]
        )


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_padding_vector_stays_zero(name):
    model = model_of(name)
    model.loss(left_padded(histories(9, seed=2)), torch.arange(9)).sum().backward()
    assert model.items.weight[0].abs().max() == 0
    assert model.items.weight.grad[0].abs().max() == 0
    assert model.items.weight.grad[1:].abs().max() > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_the_history_matters(name):
    model = model_of(name).eval()
    forward, backward = (model.scores(torch.tensor([row])) for row in ([1, 2, 3], [3, 2, 1]))
    assert (forward - backward).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["caser", "sasrec", "hstu", "esasrec"])
def test_only_the_newest_items_of_a_long_history_count(name):
    model = model_of(name).eval()
    long, other = torch.tensor([[9, 9, 1, 2, 3, 4, 5]]), torch.tensor([[7, 8, 1, 2, 3, 4, 5]])
    assert WINDOW == 5
    torch.testing.assert_close(model.scores(long), model.scores(other))
    torch.testing.assert_close(model.scores(long), model.scores(long[:, -WINDOW:]))


@pytest.mark.parametrize("name", EMBEDDED)
def test_both_losses_are_those_of_the_scores(name):
    model = model_of(name).eval()
    history_BL, target_B = left_padded(histories(6, seed=3)), torch.tensor([0, 5, 3, 11, 2, 2])
    scores_BI = model.scores(history_BL)
    torch.testing.assert_close(model.loss(history_BL, target_B), softmax_loss(scores_BI, target_B))
    negatives_BN = sample_negatives(target_B, ITEMS, 3)
    positive_B = scores_BI.gather(1, target_B.unsqueeze(1)).squeeze(1)
    expected_B = bce_loss(positive_B, scores_BI.gather(1, negatives_BN))
    torch.testing.assert_close(model.loss(history_BL, target_B, negatives_BN), expected_B)


SAMPLED = [("caser", "sampled_softmax"), ("sasrec", "sampled_softmax")]


@pytest.mark.parametrize(
    ("name", "loss"), [*((name, "softmax") for name in MODELS), *((n, "bce") for n in EMBEDDED), *SAMPLED]
)
def test_a_rule_is_learned(name, loss):
    model = model_of(name)
    rows = histories(200, seed=4)
    history_BL, target_B = left_padded(rows), torch.from_numpy(successors(rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sampler = NegativeSampler.of(np.ones(ITEMS), 4, popularity=False, logq=True)
    for _ in range(150):
        negatives = {"bce": sample_negatives(target_B, ITEMS, 4), "sampled_softmax": sampler.draw()}.get(loss)
        optimizer.zero_grad()
        model.loss(history_BL, target_B, negatives).mean().backward()
        optimizer.step()
    fresh = histories(50, seed=5)
    best_B = model.eval().scores(left_padded(fresh)).argmax(dim=1)
    assert (best_B.numpy() == successors(fresh)).mean() > 0.8


def test_gru_state_is_that_of_the_unpadded_sequence():
    model = model_of("gru4rec").eval()
    out_1LD, _ = model.gru(model.items(torch.tensor([[4, 8]])))
    expected = model.out(out_1LD[0, -1]) @ model.items.weight[1:].T
    torch.testing.assert_close(model.scores(torch.tensor([[NO_ITEM, NO_ITEM, 3, 7]]))[0], expected)


def test_left_aligned_rows():
    rows_BL, length_B = left_aligned(torch.tensor([[-1, -1, -1], [-1, 5, 0], [1, 2, 3]]))
    assert rows_BL.tolist() == [[-1, -1, -1], [5, 0, -1], [1, 2, 3]]
    assert length_B.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "tiger", "loss": "bce"}, "baseline.loss=bce"),
        ({"model": "sasrec", "hidden": 10, "heads": 4}, "baseline.heads=4 does not divide baseline.hidden=10"),
        ({"model": "hstu", "hidden": 10, "heads": 4}, "baseline.heads=4 does not divide baseline.hidden=10"),
        ({"model": "off"}, "baseline.model=off"),
        ({"model": "tiger", "loss": "sampled_softmax"}, "baseline.loss=sampled_softmax: tiger"),
        ({"model": "caser", "training": "sequences"}, "set baseline.training=windows"),
        ({"model": "gru4rec", "temperature": 0.05}, "baseline.temperature=0.05 is for sasrec, hstu, esasrec"),
        ({"model": "hstu", "negatives_from": "popularity"}, "needs baseline.loss=sampled_softmax, not softmax"),
        ({"model": "hstu", "loss": "bce", "logq_correction": True}, "needs baseline.loss=sampled_softmax, not bce"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_recommender(Blueprint(BaselineConfig(**options), ITEMS, WINDOW, PATHS))


def test_tiger_without_semantic_ids_is_refused():
    with pytest.raises(ConfigError, match=r"catalog\.kind=sid"):
        build_recommender(Blueprint(BaselineConfig(model="tiger"), ITEMS, WINDOW))


def test_empty_batches_of_histories():
    assert left_padded(TokenRows.from_lists([])).shape == (0, 0)
