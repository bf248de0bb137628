"""The target is put into groups that lack it: which place it takes, what is kept, what is marked as not known."""

from __future__ import annotations

import math

import pytest
import torch

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.rollout.groups import ensure_target
from tawin_nemo.types import NO_ITEM, PromptBatch, Rollout, TokenRows

EOS = 1
#: Items 2 and 5 are written alike; item 4 has the longest path.
PATHS = [[5, EOS], [6, 7, EOS], [8, EOS], [9, EOS], [6, 6, 6, 6, EOS], [8, EOS]]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    rows = TokenRows.from_lists(PATHS)
    names = [str(item) for item in range(len(PATHS))]
    return Catalog(names, names, "sid", rows, TokenTrie.from_paths(rows))


def rollout_of(catalog: Catalog, groups: list[list[int]], targets: list[int], *, logprobs: bool = True) -> Rollout:
    """Scores -1, -2, ... by place and log-probs that name their candidate; tokens as long as the groups need."""
    items_BG = torch.tensor(groups)
    listed_BG = items_BG != NO_ITEM
    depth = max(len(PATHS[item]) for group in groups for item in group if item != NO_ITEM)
    tokens = torch.zeros((*items_BG.shape, depth), dtype=torch.long)
    known = torch.zeros((*items_BG.shape, depth))
    for row, group in enumerate(groups):
        for place, item in enumerate(group):
            if item != NO_ITEM:
                tokens[row, place, : len(PATHS[item])] = torch.tensor(PATHS[item])
                known[row, place, : len(PATHS[item])] = -float(10 * row + place + 1)
    leaf_BG = torch.from_numpy(catalog.leaf_I)[items_BG.clamp(min=0)]
    target_leaf_B = torch.from_numpy(catalog.leaf_I)[torch.tensor(targets)]
    places = -1.0 - torch.arange(items_BG.shape[1])
    return Rollout(
        prompts=PromptBatch(
            torch.arange(len(groups)), TokenRows.from_lists([[3]] * len(groups)), torch.tensor(targets)
        ),
        items_BG=items_BG,
        tokens_BGT=tokens,
        lengths_BG=torch.where(listed_BG, torch.tensor([len(path) for path in PATHS])[items_BG.clamp(min=0)], 0),
        scores_BG=torch.where(listed_BG, places, -torch.inf),
        logprobs_BGT=known if logprobs else None,
        is_target_BG=listed_BG & (leaf_BG == target_leaf_B[:, None]),
        weight_version=7,
    )


def check_paths(rollout: Rollout) -> None:
    """Every candidate is its item's path, best score first, with a target in each group."""
    for row in range(len(rollout.prompts)):
        for place, item in enumerate(rollout.items_BG[row].tolist()):
            length = int(rollout.lengths_BG[row, place])
            tokens = rollout.tokens_BGT[row, place].tolist()
            assert tokens[:length] == (PATHS[item] if item != NO_ITEM else [])
            assert not any(tokens[length:])
    assert rollout.is_target_BG.any(dim=1).all()
    assert (rollout.scores_BG[:, 1:] <= rollout.scores_BG[:, :-1]).all()
    assert rollout.weight_version == 7


def test_a_full_group_gives_its_last_place(catalog: Catalog) -> None:
    before = rollout_of(catalog, [[0, 1, 2], [3, 1, 0]], targets=[3, 1])
    after = ensure_target(before, catalog)
    check_paths(after)
    assert after.items_BG.tolist() == [[0, 1, 3], [3, 1, 0]]
    assert after.is_target_BG.tolist() == [[False, False, True], [False, True, False]]
    assert after.inserted_BG is not None
    assert after.inserted_BG.tolist() == [[False, False, True], [False, False, False]]
    assert torch.equal(after.scores_BG, before.scores_BG)  # the place keeps its score
    assert before.items_BG.tolist() == [[0, 1, 2], [3, 1, 0]]  # the rollout itself is not touched


def test_known_logprobs_stay_and_unknown_ones_are_nan(catalog: Catalog) -> None:
    before = rollout_of(catalog, [[0, 1, 2], [3, 1, 0]], targets=[4, 1])  # item 4's path is longer than all others
    after = ensure_target(before, catalog)
    check_paths(after)
    assert before.logprobs_BGT is not None
    assert after.logprobs_BGT is not None
    assert after.inserted_BG is not None
    assert after.logprobs_BGT.shape == after.tokens_BGT.shape == (2, 3, 5)
    new = after.logprobs_BGT[after.inserted_BG]
    assert new.isnan().tolist() == [[True] * 5]
    kept = after.logprobs_BGT[~after.inserted_BG]
    assert torch.equal(kept[:, :3], before.logprobs_BGT[~after.inserted_BG])
    assert not kept[:, 3:].any()
    short = ensure_target(rollout_of(catalog, [[4, 1, 2]], targets=[0]), catalog)
    assert short.logprobs_BGT is not None
    assert short.logprobs_BGT[0, 2].isnan().tolist() == [True, True, False, False, False]  # 0 at padding, as everywhere
    assert not short.logprobs_BGT[0, 2, 2:].any()


def test_without_logprobs_there_are_none_afterwards(catalog: Catalog) -> None:
    after = ensure_target(rollout_of(catalog, [[0, 1, 2]], targets=[3], logprobs=False), catalog)
    assert after.logprobs_BGT is None
    check_paths(after)


def test_padding_is_used_first_and_nothing_valid_is_lost(catalog: Catalog) -> None:
    groups = [[0, 1, NO_ITEM, NO_ITEM], [2, NO_ITEM, NO_ITEM, NO_ITEM], [0, 1, 2, 4]]
    after = ensure_target(rollout_of(catalog, groups, targets=[3, 3, 3]), catalog)
    check_paths(after)
    assert after.items_BG.tolist() == [[0, 1, 3, NO_ITEM], [2, 3, NO_ITEM, NO_ITEM], [0, 1, 2, 3]]
    assert after.scores_BG[:, :3].isfinite().tolist() == [[True] * 3, [True, True, False], [True] * 3]
    assert after.scores_BG[0].tolist() == [-1, -2, -2, -math.inf]  # ties with the lowest rank in list order
    assert after.valid_BG.sum(dim=1).tolist() == [3, 2, 4]


def test_a_group_of_nothing_but_padding_holds_the_target_alone(catalog: Catalog) -> None:
    after = ensure_target(rollout_of(catalog, [[NO_ITEM, NO_ITEM], [0, 1]], targets=[3, 0]), catalog)
    check_paths(after)
    assert after.items_BG.tolist() == [[3, NO_ITEM], [0, 1]]
    assert after.scores_BG[0].tolist() == [0, -math.inf]


def test_a_hit_through_a_shared_path_is_a_hit(catalog: Catalog) -> None:
    """Target 5 is written like item 2: groups that hold item 2 hold their target, even where all places are hits."""
    groups = [[2, 2, 2], [0, 2, 1], [0, 1, 3]]
    before = rollout_of(catalog, groups, targets=[5, 5, 5])
    assert before.is_target_BG[0].all()
    after = ensure_target(before, catalog)
    check_paths(after)
    assert after.inserted_BG is not None
    assert after.inserted_BG.any(dim=1).tolist() == [False, False, True]
    assert torch.equal(after.items_BG[:2], before.items_BG[:2])
    assert after.items_BG[2].tolist() == [0, 1, 2]  # named by the first item of the path, as a search names it


def test_repeated_draws_are_candidates_like_others(catalog: Catalog) -> None:
    after = ensure_target(rollout_of(catalog, [[0, 0, 1]], targets=[3]), catalog)
    assert after.items_BG.tolist() == [[0, 0, 3]]


def test_groups_that_all_hold_their_target_are_unchanged(catalog: Catalog) -> None:
    before = rollout_of(catalog, [[0, 1], [3, 2]], targets=[1, 3])
    after = ensure_target(before, catalog)
    assert before.inserted_BG is None
    assert after.inserted_BG is not None
    assert not after.inserted_BG.any()
    for name in ("items_BG", "tokens_BGT", "lengths_BG", "scores_BG", "logprobs_BGT", "is_target_BG"):
        assert getattr(after, name) is getattr(before, name)
