"""Order of the data, shares of the replicas, packing under a token budget."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tawin_nemo.data.batches import (
    BatchStream,
    MixedStream,
    balanced_shard,
    epoch_order,
    micro_batches,
    shard,
)
from tawin_nemo.types import DataParallel


# -- order ---------------------------------------------------------------------------------------------------------
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3))
def test_the_stream_visits_every_row_once_per_epoch(n: int, batch_size: int, seed: int):
    stream, epochs = BatchStream(n, batch_size, seed), 3
    steps = -(-epochs * n // batch_size)
    batches = [stream.batch(step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    visited = np.concatenate(batches)
    for epoch in range(epochs):
        np.testing.assert_array_equal(visited[epoch * n : (epoch + 1) * n], epoch_order(n, seed, epoch))
        assert sorted(visited[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_depends_on_seed_and_step_only():
    forward = [BatchStream(50, 8, seed=3).batch(step) for step in range(10)]
    for step in reversed(range(10)):
        np.testing.assert_array_equal(BatchStream(50, 8, seed=3).batch(step), forward[step])
    assert not np.array_equal(BatchStream(50, 8, seed=4).batch(0), forward[0])
    assert not np.array_equal(epoch_order(50, 3, 0), epoch_order(50, 3, 1))


def test_epochs_are_counted_in_passes():
    assert BatchStream(100, 30, seed=0).epoch(5) == 5 * 30 / 100


def test_a_mixture_of_one_source_is_the_plain_stream():
    mixed, plain = MixedStream.of([50], [50], 8, 3), BatchStream(50, 8, seed=3)
    for step in range(20):
        np.testing.assert_array_equal(mixed.batch(step), plain.batch(step))
    assert MixedStream.of([5], [5], 8, 3).batch_size == 5


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 40), st.integers(0, 3))
def test_a_mixture_takes_its_shares_of_every_epoch_and_all_rows_equally_often(first, second, share, seed):
    stream = MixedStream.of([first, second], [first, share], 7, seed)
    counts = np.zeros(first + second, dtype=int)
    for epoch in range(6):
        rows = stream.order(epoch)
        assert sorted(rows[rows < first]) == list(range(first))
        assert len(rows) == first + share
        counts += np.bincount(rows, minlength=len(counts))
    assert set(counts[:first]) == {6}
    assert counts[first:].max() - counts[first:].min() <= 1
    steps = 6 * stream.n // stream.batch_size
    drawn = np.concatenate([stream.batch(step) for step in range(steps)])
    epochs = np.concatenate([stream.order(epoch) for epoch in range(6)])
    np.testing.assert_array_equal(drawn, epochs[: len(drawn)])


@pytest.mark.parametrize(("n", "batch_size"), [(0, 1), (1, 0)])
def test_a_stream_without_rows_is_refused(n: int, batch_size: int):
    with pytest.raises(ValueError, match=f"n={n}, batch_size={batch_size}"):
        BatchStream(n, batch_size, seed=0)


@given(st.integers(0, 30), st.integers(1, 8))
def test_shares_of_the_replicas_are_disjoint_complete_and_even(n: int, size: int):
    rows = np.arange(n) * 10
    shares = [shard(rows, DataParallel(rank, size)) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == list(rows)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1


@st.composite
def lengths_and_replicas(draw: st.DrawFn) -> tuple[list[int], int]:
    return draw(st.lists(st.integers(1, 500), max_size=60)), draw(st.integers(1, 8))


@given(lengths_and_replicas())
def test_balanced_shares_are_disjoint_complete_even_and_in_order(case: tuple[list[int], int]):
    lengths, size = case
    rows = np.random.default_rng(0).permutation(1000)[: len(lengths)]
    shares = [balanced_shard(rows, np.array(lengths, np.int64), DataParallel(rank, size)) for rank in range(size)]
    assert sorted(np.concatenate(shares)) == sorted(rows)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    place = {row: place for place, row in enumerate(rows.tolist())}
    for share in shares:
        places = [place[row] for row in share.tolist()]
        assert places == sorted(places)
    again = [balanced_shard(rows, np.array(lengths, np.int64), DataParallel(rank, size)) for rank in range(size)]
    assert all(np.array_equal(one, other) for one, other in zip(shares, again, strict=True))


@given(lengths_and_replicas())
def test_balanced_shares_differ_by_one_row_of_tokens_at_most(case: tuple[list[int], int]):
    """Dealt up and down, two shares of equally many rows differ by less than the longest row."""
    lengths, size = case
    rows = np.arange(len(lengths))
    shares = [balanced_shard(rows, np.array(lengths, np.int64), DataParallel(rank, size)) for rank in range(size)]
    sums = [sum(lengths[row] for row in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths, default=0)


def test_one_replica_gets_everything_and_lengths_must_fit():
    rows = np.array([4, 1, 7])
    assert balanced_shard(rows, np.array([2, 9, 5]), DataParallel()).tolist() == [4, 1, 7]
    assert balanced_shard(rows, np.array([2, 9, 5]), DataParallel(0, 2)).tolist() == [1]
    assert balanced_shard(rows, np.array([2, 9, 5]), DataParallel(1, 2)).tolist() == [4, 7]
    with pytest.raises(ValueError, match="3 rows but 2 lengths"):
        balanced_shard(rows, np.array([2, 9]), DataParallel())


# -- packing -------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 60), max_size=50), st.integers(1, 200))
def test_micro_batches_hold_every_prompt_once_within_the_budget(tokens: list[int], budget: int):
    tokens_B = np.array(tokens, dtype=np.int64)
    groups = micro_batches(tokens_B, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(tokens)))
    for group in groups:
        assert tokens_B[group].sum() <= budget or len(group) == 1
    for group, behind in pairwise(groups):  # as much as fits
        assert tokens_B[group].sum() + tokens_B[behind[0]] > budget


def test_micro_batches_group_prompts_of_similar_size_largest_first():
    groups = micro_batches(np.array([2, 9, 3, 10, 2]), token_budget=20)
    assert [group.tolist() for group in groups] == [[3, 1], [2, 0, 4]]
    assert [group.tolist() for group in micro_batches(np.array([7, 30, 7]), token_budget=14)] == [[1], [0, 2]]


@pytest.mark.parametrize("n", [1, 2, 9, 70_000])
def test_the_order_of_small_numbers_is_numpy_s_permutation(n: int):
    order = epoch_order(n, 3, 5)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, np.random.default_rng([3, 5]).permutation(n))


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch):
    shuffled = []
    plain = epoch_order
    monkeypatch.setattr("tawin_nemo.data.batches.epoch_order", lambda *given: shuffled.append(given) or plain(*given))
    for stream in (
        BatchStream(90, 7, seed=11),
        MixedStream.of([90], [90], 7, seed=12),
        MixedStream.of([9, 3], [9, 1], 2, 13),
    ):
        shuffled.clear()
        batches = [stream.batch(step) for step in range(stream.n // stream.batch_size)]
        assert [seed for _, seed, epoch in shuffled if epoch == 0].count(stream.seed) == 1
        assert all(batch.dtype == np.int64 and batch.flags.writeable for batch in batches)
        np.testing.assert_array_equal(np.concatenate(batches), stream.make_order(0)[: sum(map(len, batches))])
        assert not stream.order(0).flags.writeable


def test_all_of_every_source_is_the_sources_one_after_another():
    whole, shares = MixedStream.of([5, 4], [5, 4], 3, 2), np.arange(9)
    np.testing.assert_array_equal(whole.order(1), shares[epoch_order(9, 2, 1)])
