"""TokenRows against lists; rollouts on other devices."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.types import PromptBatch, Rollout, TokenRows

rows_of_tokens = st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6)


@given(rows_of_tokens, st.data())
def test_take_and_padding_equal_lists(lists, data):
    rows = TokenRows.from_lists(lists)
    picked = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=6)) if lists else []
    taken = rows.take(np.array(picked, dtype=np.int64))
    assert [taken[i].tolist() for i in range(len(taken))] == [lists[i] for i in picked]
    tokens, lengths = rows.padded(pad=-1)
    assert lengths.tolist() == [len(row) for row in lists]
    assert [row[:n].tolist() for row, n in zip(tokens, lengths.tolist(), strict=True)] == lists
    assert all((row[n:] == -1).all() for row, n in zip(tokens, lengths.tolist(), strict=True))


def test_offsets_must_cover_the_tokens():
    with pytest.raises(ValueError, match="offsets"):
        TokenRows(np.arange(3), np.array([0, 2]))


def test_a_rollout_moves_as_a_whole():
    size = (2, 3)
    rollout = Rollout(
        prompts=PromptBatch(torch.arange(2), TokenRows.from_lists([[1], [2]]), torch.arange(2)),
        items_BG=torch.zeros(size, dtype=torch.long), tokens_BGT=torch.zeros(*size, 1), lengths_BG=torch.ones(size),
        scores_BG=torch.zeros(size), logprobs_BGT=None, is_target_BG=torch.zeros(size).bool(), weight_version=3,
    )  # fmt: skip
    there = rollout.to("meta")
    tensors = [getattr(there, item.name) for item in fields(there) if item.name.endswith(("_BG", "_BGT"))]
    assert all(value is None or value.device.type == "meta" for value in tensors)
    assert there.prompts is rollout.prompts
    assert there.weight_version == 3
