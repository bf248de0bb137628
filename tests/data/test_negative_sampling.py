"""Rejected items without a model: what they never are, that they are uniform, and what they depend on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.data.negative_sampling import CandidateNegatives, RandomNegatives, candidate_set
from tawin_nemo.data.samples import Samples
from tawin_nemo.types import NO_ITEM, TokenRows
from tawin_nemo.util.errors import DataError

ITEMS = 30


def samples(rows: int = 12, items: int = ITEMS) -> Samples:
    draw = np.random.default_rng(0)
    history = TokenRows.from_lists([draw.integers(0, items, size=draw.integers(1, 6)) for _ in range(rows)])
    return Samples(TokenRows.from_lists([[1]] * rows), draw.integers(0, items, size=rows), np.arange(rows), history)


def leaves(items: int = ITEMS) -> np.ndarray:
    """Items 0 and 1, 2 and 3 ... of the first ten share their path."""
    leaf_I = 100 + np.arange(items)
    leaf_I[1:10:2] = leaf_I[0:10:2]
    return leaf_I


@settings(max_examples=50)
@given(num=st.integers(1, 8), seed=st.integers(0, 5), step=st.integers(0, 50))
def test_never_the_target_the_history_or_what_is_written_like_them(num, seed, step):
    rows, data, leaf_I = np.arange(12), samples(), leaves()
    for source in (RandomNegatives(data, leaf_I, num, seed), CandidateNegatives(data, leaf_I, num, seed, 12)):
        items_RN = source.items(rows, step)
        assert items_RN.shape == (12, num)
        for row in rows:
            taken = leaf_I[items_RN[row]]
            assert len(set(taken.tolist())) == num
            assert not set(taken.tolist()) & set(leaf_I[np.append(data.history[row], data.target_N[row])].tolist())


def test_they_depend_on_seed_step_and_row_alone():
    data, leaf_I = samples(), leaves()
    source = RandomNegatives(data, leaf_I, 3, seed=4)
    whole = source.items(np.arange(12), 7)
    assert np.array_equal(source.items(np.array([5, 2]), 7), whole[[5, 2]])
    assert not np.array_equal(source.items(np.arange(12), 8), whole)
    assert not np.array_equal(RandomNegatives(data, leaf_I, 3, seed=5).items(np.arange(12), 7), whole)


def test_random_items_are_uniform():
    """Over many steps every admissible path comes equally often, within 4 standard deviations."""
    data, leaf_I, steps = samples(), leaves(), 2000
    source = RandomNegatives(data, leaf_I, 2, seed=1)
    drawn = np.concatenate([source.items(np.array([3]), step)[0] for step in range(steps)])
    barred = set(leaf_I[np.append(data.history[3], data.target_N[3])].tolist())
    free = [leaf for leaf in np.unique(leaf_I) if leaf not in barred]
    # an item of a shared path is drawn as often as any other item, so its path comes twice as often
    weight = np.array([(leaf_I == leaf).sum() for leaf in free])
    alone = [leaf for leaf, copies in zip(free, weight, strict=True) if copies == 1]
    counts = np.array([(leaf_I[drawn] == leaf).sum() for leaf in alone])
    mean = counts.mean()
    assert abs(counts - mean).max() < 4 * np.sqrt(mean)
    assert counts.sum() + (~np.isin(leaf_I[drawn], alone)).sum() == 2 * steps


def test_a_candidate_set_is_fixed_shuffled_and_holds_the_target():
    data, leaf_I = samples(), leaves()
    places = []
    for row in range(12):
        items_C = candidate_set(data, leaf_I, row, 12, seed=3)
        assert np.array_equal(items_C, candidate_set(data, leaf_I, row, 12, seed=3))
        assert len(items_C) == 12
        assert (items_C == data.target_N[row]).sum() == 1
        places.append(int(np.flatnonzero(items_C == data.target_N[row])[0]))
    assert len(set(places)) > 3


def test_candidate_negatives_come_from_the_set_and_change_with_the_step():
    data, leaf_I = samples(), leaves()
    source = CandidateNegatives(data, leaf_I, 3, seed=3, candidates=12)
    seen = set()
    for step in range(60):
        items = source.items(np.array([4]), step)[0]
        seen |= set(items.tolist())
    assert seen == set(candidate_set(data, leaf_I, 4, 12, seed=3).tolist()) - {int(data.target_N[4])}


def test_a_tiny_catalog_gives_what_there_is():
    data, leaf_I = samples(items=4), np.arange(4)
    items_RN = RandomNegatives(data, leaf_I, 4, seed=0).items(np.arange(12), 0)
    for row in range(12):
        barred = {*data.history[row].tolist(), int(data.target_N[row])}
        assert set(items_RN[row].tolist()) - {NO_ITEM} == set(range(4)) - barred
        assert (items_RN[row] == NO_ITEM).sum() == len(barred)
    with pytest.raises(DataError, match=r"row 0 of train has \d candidates .* preference.num_negatives=4; lower it"):
        CandidateNegatives(data, leaf_I, 4, seed=0, candidates=20).items(np.arange(12), 0)
