"""``found_in_both``: candidates that two rollouts of the same prompts share."""

from types import SimpleNamespace

import torch

from tawin_nemo.rollout.groups import found_in_both
from tawin_nemo.types import NO_ITEM


def rollout(items, inserted=None):
    items_BG = torch.tensor(items)
    inserted_BG = None if inserted is None else torch.tensor(inserted)
    return SimpleNamespace(items_BG=items_BG, valid_BG=items_BG != NO_ITEM, inserted_BG=inserted_BG)


def test_order_does_not_matter_and_prompts_are_not_mixed():
    assert found_in_both(rollout([[1, 2, 3], [4, 5, 6]]), rollout([[3, 9, 1], [1, 2, 3]])) == (2, 6)


def test_padding_and_inserted_targets_do_not_count():
    own = rollout([[1, NO_ITEM], [4, 7]], inserted=[[False, False], [False, True]])
    assert found_in_both(own, rollout([[1, NO_ITEM], [7, 4]])) == (2, 2)
    assert found_in_both(own, rollout([[2, NO_ITEM], [7, 8]])) == (0, 2)
