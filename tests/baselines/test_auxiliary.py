"""A finished baseline as the auxiliary model of preference optimisation: states, cosines, what is refused."""

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.auxiliary import load_auxiliary
from tawin_nemo.types import NO_ITEM
from tawin_nemo.util.errors import ConfigError
from tests.baselines.patterns import ITEMS
from tests.baselines.test_load import IDS, finished_stage

HISTORIES = [np.array([4, 2]), np.array([7, 8, 9]), np.array([1])]


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "caser"])
def test_the_inner_product_of_state_and_item_vector_is_the_score(name, tmp_path):
    """Cosine times both lengths (and the bias of an untied output) gives the model's own scores."""
    finished_stage(tmp_path, name, seed=5)
    aux = load_auxiliary(str(tmp_path), IDS)
    state_BD = aux.states(HISTORIES)
    items_BN = torch.arange(ITEMS).repeat(len(HISTORIES), 1)
    cosine_BN = aux.cosines(state_BD, items_BN)
    assert float(cosine_BN.abs().max()) <= 1.0
    output = aux.model.output
    table_ID = aux.model.items.weight[1:] if output is None else output.weight
    scores_BN = cosine_BN * state_BD.norm(dim=1, keepdim=True) * table_ID.norm(dim=1)
    padded_BL = torch.tensor([[NO_ITEM, 4, 2], [7, 8, 9], [NO_ITEM, NO_ITEM, 1]])
    expected_BN = aux.model.scores(padded_BL) - (0 if output is None else output.bias)
    torch.testing.assert_close(scores_BN, expected_BN, rtol=1e-4, atol=1e-5)


def test_the_state_of_a_history_does_not_depend_on_the_others(tmp_path):
    finished_stage(tmp_path, "sasrec", seed=5)
    aux = load_auxiliary(str(tmp_path), IDS)
    together = aux.states(HISTORIES)
    for row, history in enumerate(HISTORIES):
        torch.testing.assert_close(aux.states([history])[0], together[row], rtol=1e-5, atol=1e-6)


def test_other_catalogs_and_models_without_states_are_refused(tmp_path):
    finished_stage(tmp_path / "sasrec", "sasrec", seed=1)
    finished_stage(tmp_path / "tiger", "tiger", seed=1)
    with pytest.raises(ConfigError, match=r"preference.aux=.*ranks 12 items, but the catalog has 13"):
        load_auxiliary(str(tmp_path / "sasrec"), [*IDS, "more"])
    with pytest.raises(ConfigError, match=r"preference.aux=.*tiger has no states"):
        load_auxiliary(str(tmp_path / "tiger"), IDS)
