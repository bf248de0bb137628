"""Order of the data, packing under a token budget, and rows of prompt + answer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.data.batches import (
    BatchStream,
    ChainIndex,
    candidate_batch,
    chain_batch,
    chain_lengths,
    epoch_order,
    micro_batches,
    shard,
)
from tawin_nemo.errors import CatalogError
from tawin_nemo.types import NO_ITEM, DataParallel, PromptBatch, Rollout, TokenBatch, TokenRows

EOS = 1
#: Shared beginnings, forced stretches at the start, in the middle and at the end, two items on one path.
PATHS = [[5, 6, 2, EOS], [5, 6, 3, 4, 4, EOS], [5, 6, 3, 7, EOS], [5, 6, 3, 4, 4, EOS], [5, 8, EOS], [9, 9, 9, EOS]]
TRIE = TokenTrie.from_paths(PATHS)
PROMPTS = [[2], [3, 3, 3], [4, 5], [6, 7, 8, 9, 2], [2, 2], [3]]

histories = st.lists(st.tuples(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(0, 5)), max_size=7)


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


# -- packing -------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(0, 60), max_size=50), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int):
    lengths_N = np.array(lengths, dtype=np.int64)
    groups = micro_batches(lengths_N, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(1, lengths_N[group].max())
        assert padded <= budget or len(group) == 1


def test_micro_batches_group_rows_of_similar_length_longest_first():
    groups = micro_batches(np.array([2, 9, 3, 10, 2]), token_budget=20)
    assert [group.tolist() for group in groups] == [[3, 1], [2, 0, 4]]


# -- chains --------------------------------------------------------------------------------------------------------
def slow_chain(prompts: list[list[int]], answers: list[list[int]], trie: TokenTrie | None):
    """Per token: (row, token, position, target, admissible tokens) and the inputs of each row."""
    scored, inputs = [], []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        node, last = TokenTrie.root, 0
        for place, token in enumerate(answer):
            admissible = None if trie is None else trie.children(node)[0].tolist()
            if admissible is None or len(admissible) > 1:
                scored.append((row, place, len(prompt) + place - 1, token, admissible))
                last = place
            node = node if trie is None else trie.step(node, token)
        inputs.append([*prompt, *answer[:last]])
    return scored, inputs


def fast_chain(batch: TokenBatch, index: ChainIndex):
    """The same facts, read out of the tensors."""
    inputs = [row[:length].tolist() for row, length in zip(batch.tokens_BT, batch.lengths_B, strict=True)]
    admissible: list[list[int] | None] = [None] * len(batch.row_N)
    if batch.children is not None:
        edges = batch.children
        admissible = [edges.token_E[edges.position_E == place].tolist() for place in range(len(batch.row_N))]
        assert edges.token_E[edges.chosen_N].tolist() == batch.target_N.tolist()
        assert edges.position_E[edges.chosen_N].tolist() == list(range(len(batch.row_N)))
        assert (edges.position_E.diff() >= 0).all()
    assert index.row_N.tolist() == batch.row_N.tolist()
    columns = (index.row_N, index.token_N, batch.position_N, batch.target_N)
    return list(zip(*(column.tolist() for column in columns), admissible, strict=True)), inputs


@pytest.mark.parametrize("trie", [None, TRIE], ids=["vocab", "trie"])
@given(rows=histories)
def test_chains_equal_the_token_by_token_definition(trie: TokenTrie | None, rows):
    prompts, answers = [prompt for prompt, _ in rows], [PATHS[item] for _, item in rows]
    batch, index = chain_batch(TokenRows.from_lists(prompts), TokenRows.from_lists(answers), trie)
    assert fast_chain(batch, index) == slow_chain(prompts, answers, trie)
    beyond = torch.arange(batch.tokens_BT.shape[1]) >= batch.lengths_B[:, None]
    assert (batch.tokens_BT[beyond] == 0).all()
    assert batch.tokens_BT.shape[1] == max(batch.lengths_B.tolist(), default=0)
    lengths = chain_lengths(TokenRows.from_lists(prompts), TokenRows.from_lists(answers), trie)
    assert lengths.tolist() == batch.lengths_B.tolist()


def test_one_chain_spelled_out():
    """Root {5, 9} and node 56 {2, 3} branch, then 563 {4, 7}; the tail 4, EOS is forced and never an input."""
    batch, index = chain_batch(TokenRows.from_lists([[2, 2]]), TokenRows.from_lists([PATHS[1]]), TRIE)
    assert batch.tokens_BT.tolist() == [[2, 2, 5, 6, 3]]
    assert index.token_N.tolist() == [0, 1, 2, 3]
    assert batch.position_N.tolist() == [1, 2, 3, 4]
    assert batch.children is not None
    assert batch.children.token_E.tolist() == [5, 9, 6, 8, 2, 3, 4, 7]


def test_a_catalogue_of_one_item_has_nothing_to_score():
    trie = TokenTrie.from_paths([[5, EOS]])
    batch, _ = chain_batch(TokenRows.from_lists([[2, 3]]), TokenRows.from_lists([[5, EOS]]), trie)
    assert len(batch.row_N) == 0
    assert batch.tokens_BT.tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("answer", "place"), [([5, 6, 9, EOS], 2), ([5, 8, EOS, EOS], 3), ([8, EOS], 0), ([9, 9, 9, 2], 3)]
)
def test_answers_off_the_trie_are_refused(answer: list[int], place: int):
    answers = TokenRows.from_lists([PATHS[0], answer])
    with pytest.raises(CatalogError, match=f"answer 1 leaves the catalogue at its token {place}"):
        chain_batch(TokenRows.from_lists([[2], [2]]), answers, TRIE)


def test_prompts_must_fit_the_answers():
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        chain_batch(TokenRows.from_lists([[2], [2]]), TokenRows.from_lists(PATHS[:1]), None)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        chain_batch(TokenRows.from_lists([[2], []]), TokenRows.from_lists(PATHS[:2]), None)


def test_scatter_puts_values_back_and_passes_gradients():
    prompts, answers = TokenRows.from_lists(PROMPTS), TokenRows.from_lists(PATHS)
    _, index = chain_batch(prompts, answers, TRIE)
    values_N = torch.arange(1.0, len(index.row_N) + 1, requires_grad=True)
    values_BT = index.scatter(values_N, len(PATHS), 6)
    expected = torch.zeros(len(PATHS), 6)
    for n, (row, token) in enumerate(zip(index.row_N, index.token_N, strict=True)):
        expected[row, token] = n + 1.0
    assert torch.equal(values_BT.detach(), expected)
    values_BT.square().sum().backward()
    assert torch.equal(values_N.grad, 2 * values_N.detach())


# -- candidates of a rollout ---------------------------------------------------------------------------------------
def rollout() -> Rollout:
    items_BG = torch.tensor([[0, 4, 5], [2, NO_ITEM, NO_ITEM]])
    paths = TokenRows.from_lists([PATHS[item] if item != NO_ITEM else [] for item in items_BG.flatten().tolist()])
    tokens, lengths = paths.padded()
    prompts = PromptBatch(torch.arange(2), TokenRows.from_lists(PROMPTS[:2]), torch.tensor([4, 3]))
    zeros = torch.zeros(2, 3)
    return Rollout(
        prompts, items_BG, tokens.view(2, 3, -1), lengths.view(2, 3), zeros, zeros[..., None], zeros.bool(), 0
    )


@pytest.mark.parametrize("trie", [None, TRIE], ids=["vocab", "trie"])
def test_candidates_stand_behind_their_own_prompt(trie: TokenTrie | None):
    candidates = rollout()
    rows = torch.tensor([3, 0, 2])  # (b, g) = (1, 0), (0, 0), (0, 2)
    batch, index = candidate_batch(candidates, rows, trie)
    expected = slow_chain([PROMPTS[1], PROMPTS[0], PROMPTS[0]], [PATHS[2], PATHS[0], PATHS[5]], trie)
    assert fast_chain(batch, index) == expected


def test_a_missing_candidate_is_refused():
    with pytest.raises(ValueError, match="candidate 4 is NO_ITEM"):
        candidate_batch(rollout(), torch.tensor([0, 4]), TRIE)


@settings(max_examples=20)
@given(st.permutations(range(6)), st.integers(1, 40))
def test_micro_batches_of_chains_partition_the_scored_places(order, budget: int):
    prompts, answers = TokenRows.from_lists(PROMPTS), TokenRows.from_lists(PATHS)
    rows = np.array(order)
    _, whole = chain_batch(prompts.take(rows), answers.take(rows), TRIE)
    lengths = chain_lengths(prompts.take(rows), answers.take(rows), TRIE)
    parts = []
    for group in micro_batches(lengths, budget):
        batch, index = chain_batch(prompts.take(rows[group]), answers.take(rows[group]), TRIE)
        assert batch.tokens_BT.numel() <= budget or len(group) == 1
        parts += [(group[row], token) for row, token in zip(index.row_N.tolist(), index.token_N.tolist(), strict=True)]
    assert sorted(parts) == list(zip(whole.row_N.tolist(), whole.token_N.tolist(), strict=True))
