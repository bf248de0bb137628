"""TokenRows against lists; records: taking, concatenating, changing and moving all their tensors."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.types import Candidates, PromptBatch, PromptRecord, Rollout, TokenRows

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


def rollout_of(rows: list[int], tokens: int = 2, version: int = 4) -> Rollout:
    """One group of three candidates per row; every tensor says which row it belongs to."""
    row_B = torch.tensor(rows, dtype=torch.long)
    row_BG = row_B[:, None].expand(-1, 3)
    return Rollout(
        prompts=PromptBatch(row_B, TokenRows.from_lists([[row] * (row + 1) for row in rows]), row_B * 10),
        items_BG=row_BG, tokens_BGT=row_BG[..., None].expand(-1, -1, tokens), lengths_BG=row_BG + 1,
        scores_BG=-row_BG.double(), logprobs_BGT=-row_BG[..., None].expand(-1, -1, tokens).float(),
        is_target_BG=row_BG % 2 == 0, weight_version=version,
    )  # fmt: skip


def assert_same(one: PromptRecord, other: PromptRecord) -> None:
    for item in fields(one):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if isinstance(a, PromptRecord):
            assert_same(a, b)
        elif isinstance(a, TokenRows):
            assert [a[i].tolist() for i in range(len(a))] == [b[i].tolist() for i in range(len(b))]
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, item.name
            assert torch.equal(a, b), item.name
        else:
            assert a == b, item.name


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_take_and_cat_follow_the_rows(rows, data):
    whole = rollout_of(rows)
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=5))
    assert_same(whole.take(torch.tensor(picked, dtype=torch.long)), rollout_of([rows[i] for i in picked]))
    cut = data.draw(st.integers(0, len(rows)))
    assert_same(Rollout.cat([rollout_of(rows[:cut]), rollout_of(rows[cut:])]), whole)


def test_cat_pads_token_axes_with_zeros():
    both = Rollout.cat([rollout_of([1], tokens=2), rollout_of([2], tokens=4)])
    assert both.tokens_BGT[:, 0].tolist() == [[1, 1, 0, 0], [2, 2, 2, 2]]
    assert both.logprobs_BGT is not None
    assert both.logprobs_BGT[:, 0].tolist() == [[-1, -1, 0, 0], [-2, -2, -2, -2]]


def test_cat_of_a_missing_tensor_is_missing():
    assert Rollout.cat([replace(rollout_of([1]), logprobs_BGT=None), rollout_of([2])]).logprobs_BGT is None


def test_cat_returns_a_single_part_itself_and_wants_one_version():
    one = rollout_of([1, 2])
    assert Rollout.cat([one]) is one
    with pytest.raises(ValueError, match=r"weight_version \[4, 5\]"):
        Rollout.cat([one, rollout_of([3], version=5)])
    with pytest.raises(ValueError, match="at least one part"):
        Rollout.cat([])


def test_map_changes_tensors_alone():
    one = rollout_of([1, 2])
    flipped = one.map(lambda tensor: tensor.flip(0))
    assert flipped.items_BG.tolist() == [[2] * 3, [1] * 3]
    assert flipped.prompts is one.prompts
    assert flipped.inserted_BG is None
    assert "weight_version" not in one.tensors()


def test_top_keeps_the_first_candidates():
    row_BW = torch.arange(6).view(2, 3)
    tokens_BWT = row_BW[..., None].expand(2, 3, 2)
    candidates = Candidates(row_BW, row_BW, tokens_BWT, row_BW, row_BW.float(), tokens_BWT.float())
    best = candidates.top(2)
    assert best.items_BW.tolist() == [[0, 1], [3, 4]]
    assert best.tokens_BWT.shape == best.logprobs_BWT.shape == (2, 2, 2)
