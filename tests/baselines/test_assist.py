"""A finished recommender as the assistant of searches: whose histories it reads, and what it does with news."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.assist import AuxiliaryRecommender, CatalogAssistant, load_auxiliary_recommender
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import AssistConfig
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import ConfigError
from tests.baselines.test_load import IDS, finished_stage

TRIE = TokenTrie.from_paths([[1 + item // 4, 1 + item % 4, 0] for item in range(len(IDS))])


def recommender(folder: Path, weight: float = 0.4) -> AuxiliaryRecommender:
    finished_stage(folder, "sasrec", seed=5)
    made = load_auxiliary_recommender(AssistConfig(str(folder), weight), IDS)
    assert made is not None
    return made


def shares(assist_V: torch.Tensor, leaf_I: np.ndarray) -> torch.Tensor:
    """Log-prob of every item: the sum of the edges above it."""
    arrays = TRIE.arrays
    above = {
        int(child): node for node in range(TRIE.num_inner)
        for child in arrays.child_nodes[arrays.child_offsets[node] : arrays.child_offsets[node + 1]]
    }  # fmt: skip
    sums = []
    for leaf in leaf_I.tolist():
        total, node = 0.0, leaf
        while node:
            total, node = total + float(assist_V[node]), above[node]
        sums.append(total)
    return torch.tensor(sums)


def test_a_path_sums_to_the_recommenders_own_softmax(tmp_path: Path) -> None:
    aux = recommender(tmp_path)
    histories = TokenRows.from_lists([[4, 2], [], [7, 8, 9, 1, 2, 3, 4]])
    assist = CatalogAssistant(aux, TRIE)(histories)
    assert assist.weight_P.tolist() == [0.4, 1.0, 0.4]  # who has no history is searched without assistance
    assert not assist.edge_PV[1].any()
    scores_BI = aux.scorer.scores([histories[0], histories[2]])
    for row, scores_I in zip((0, 2), scores_BI, strict=True):
        expected = torch.log_softmax(scores_I.double(), dim=0)
        torch.testing.assert_close(shares(assist.edge_PV[row], TRIE.leaf_I).double(), expected, atol=1e-6, rtol=0)


def test_an_item_it_does_not_know_scores_as_the_median(tmp_path: Path) -> None:
    aux = recommender(tmp_path)
    names = [*IDS[:7], "new", *IDS[8:]]  # the catalog of a server: one item left, another came
    item_J = aux.items_of(names)
    assert item_J.tolist() == [*range(7), -1, *range(8, len(IDS))]
    scores_I = aux.scorer.scores([np.array([4, 2])])[0].double()
    scores_I[7] = scores_I.median()
    assist = aux.assist(TRIE, [np.array([4, 2])], item_J)
    expected = torch.log_softmax(scores_I, dim=0)
    torch.testing.assert_close(shares(assist.edge_PV[0], TRIE.leaf_I).double(), expected, atol=1e-6, rtol=0)


def test_without_a_stage_and_with_weight_one_there_is_no_assistance(tmp_path: Path) -> None:
    assert load_auxiliary_recommender(AssistConfig(), IDS) is None
    finished_stage(tmp_path, "gru4rec", seed=1)
    assert load_auxiliary_recommender(AssistConfig(str(tmp_path), 1.0), IDS) is None


def test_a_stage_that_cannot_assist_names_the_key(tmp_path: Path) -> None:
    for weight in (0.5, 1.0):
        with pytest.raises(ConfigError, match=r"rollout\.assist\.stage=.*not a finished baseline"):
            load_auxiliary_recommender(AssistConfig(str(tmp_path), weight), IDS)
    finished_stage(tmp_path, "tiger", seed=1)
    with pytest.raises(ConfigError, match=r"rollout\.assist\.stage=.*tiger"):
        load_auxiliary_recommender(AssistConfig(str(tmp_path)), IDS)
    finished_stage(tmp_path, "gru4rec", seed=1)
    with pytest.raises(ConfigError, match=r"rollout\.assist\.stage=.*not the same ones"):
        load_auxiliary_recommender(AssistConfig(str(tmp_path)), [*IDS[:-1], "other"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.assist.stage=x", "rollout.assist.weight=1.2"], r"rollout\.assist\.weight.*1"),
        (["rollout.assist.stage=x", "rollout.assist.weight=-0.1"], r"rollout\.assist\.weight.*0"),
        (["rollout.assist.weight=0.8"], r"rollout\.assist\.weight=0\.8 weighs the model against .*, which is empty"),
        (
            ["rollout.assist.stage=x", "rollout.placement=separate", "rollout.devices=1", "trainer.devices=2"],
            r"rollout\.assist\.stage=x joins searches of this process.*separate",
        ),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, ["data.dataset=synthetic", *words])
