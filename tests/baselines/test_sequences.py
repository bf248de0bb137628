"""Training on whole sequences: what is read and predicted, no leakage, the same losses as the windows, causality."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tawin_nemo.baselines.protocol import left_padded, sample_negatives
from tawin_nemo.baselines.sampled_softmax import NegativeSampler
from tawin_nemo.baselines.sequences import Sequences, user_sequences
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.samples import Samples
from tawin_nemo.data_prep.pipeline import sliding_windows
from tawin_nemo.data_prep.splits import split_by_time
from tawin_nemo.types import NO_ITEM, TokenRows
from tests.baselines.patterns import ITEMS, WINDOW, model_of

CAUSAL = ("sasrec", "hstu", "esasrec")
#: Two orders of the same sums, in float64 and float32.
SAME64, SAME32 = {"rtol": 1e-10, "atol": 1e-12}, {"rtol": 1e-4, "atol": 1e-5}


def samples_of(split: Split) -> Samples:
    return Samples(split.history, split.target_N, split.user_N, split.history)


def generated(users: int, *, longest: int, max_history: int, seed: int, items: int = 0) -> Split:
    """2 .. ``longest`` interactions per user, those of all users mixed in time; ``items=0``: each its own item."""
    draw = np.random.default_rng(seed)
    user_N = np.repeat(np.arange(users), draw.integers(2, longest + 1, size=users))
    item_N = draw.integers(0, items, size=len(user_N)) if items else np.arange(len(user_N))
    time_N = draw.permutation(len(user_N))
    return sliding_windows(user_N, item_N, time_N[np.lexsort((time_N, user_N))], max_history)


def as_lists(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    return [(sequences.inputs[row].tolist(), sequences.targets[row].tolist()) for row in range(len(sequences))]


def slow_sequences(samples: Samples, longest: int) -> list[tuple[list[int], list[int]]]:
    """The definition, row by row."""
    chains: dict[int, list[tuple[list[int], int]]] = {}
    for row, user in enumerate(samples.user_N.tolist()):
        history, target = samples.history[row].tolist(), int(samples.target_N[row])
        mine = chains.setdefault(user, [])
        if mine:
            items, known = mine[-1]
            if len(history) <= len(items) and items[-len(history) :] == history:
                mine[-1] = ([*items, target], known)
                continue
        mine.append(([*history, target], len(history)))
    pieces = []
    for user in sorted(chains):
        for items, known in chains[user]:
            read = items[:-1]
            targets = [NO_ITEM if place < known else items[place] for place in range(1, len(items))]
            cuts = sorted({0, *range(len(read), 0, -longest)})
            for start, stop in pairwise(cuts):
                if any(target != NO_ITEM for target in targets[start:stop]):
                    pieces.append((read[start:stop], targets[start:stop]))
    return pieces


@pytest.mark.parametrize("max_history", [1, 3, 50])
@pytest.mark.parametrize("items", [0, 4], ids=["distinct items", "repeated items"])
def test_sequences_are_the_rows_of_their_users(max_history, items):
    rows = samples_of(generated(40, longest=12, max_history=max_history, seed=max_history, items=items))
    for part in (rows, rows.take(np.arange(len(rows) // 3, len(rows)))):  # the second begins within users
        found = user_sequences(part, max_history)
        assert as_lists(found) == slow_sequences(part, max_history)
        assert found.num_targets == len(part)
        assert found.inputs.lengths.max() <= max_history


def test_only_targets_of_train_are_learned_and_only_from_what_came_before():
    """Every interaction is an item of its own, numbered by user and position, so that a leak has a name."""
    train, valid, test = split_by_time(generated(60, longest=12, max_history=4, seed=1))
    sequences = user_sequences(samples_of(train), 4)
    learned = sequences.targets.flat[sequences.targets.flat != NO_ITEM]
    assert sorted(learned) == sorted(train.target_N)
    later = {*valid.target_N.tolist(), *test.target_N.tolist()}
    assert later
    assert not later & {*learned.tolist(), *sequences.inputs.flat.tolist()}
    predicted = sequences.targets.flat != NO_ITEM
    assert (sequences.targets.flat[predicted] == sequences.inputs.flat[predicted] + 1).all()
    users = dict(zip(train.target_N.tolist(), train.user_N.tolist(), strict=True))
    for items, targets in as_lists(sequences):
        assert items == list(range(items[0], items[0] + len(items)))
        assert len({users[target] for target in targets if target != NO_ITEM}) == 1


def test_a_long_user_is_cut_from_the_newest_end():
    rows = samples_of(sliding_windows(np.zeros(8, np.int64), np.arange(8), np.arange(8), 3))
    assert as_lists(user_sequences(rows, 3)) == [([0], [1]), ([1, 2, 3], [2, 3, 4]), ([4, 5, 6], [5, 6, 7])]


def test_items_before_the_first_row_are_read_and_not_predicted():
    history = TokenRows.from_lists([[5, 6, 7], [6, 7, 8]])
    rows = Samples(history, np.array([8, 9]), np.array([3, 3]), history)
    assert as_lists(user_sequences(rows, 10)) == [([5, 6, 7, 8], [NO_ITEM, NO_ITEM, 8, 9])]


def test_a_row_that_does_not_continue_its_user_begins_a_sequence():
    history = TokenRows.from_lists([[5], [5, 6], [2, 6, 7], [7], [1]])
    rows = Samples(history, np.array([6, 7, 4, 4, 2]), np.array([3, 3, 3, 3, 8]), history)
    expected = [([5, 6], [6, 7]), ([2, 6, 7], [NO_ITEM, NO_ITEM, 4]), ([7], [4]), ([1], [2])]
    assert as_lists(user_sequences(rows, 10)) == expected


# -- the losses ----------------------------------------------------------------------------------------------------
def negatives_of(loss: str, target_M: torch.Tensor):
    torch.manual_seed(7)
    if loss == "bce":
        return sample_negatives(target_M, ITEMS, 3)
    if loss == "sampled_softmax":
        count_I = np.bincount(target_M.numpy(), minlength=ITEMS)
        return NegativeSampler.of(count_I, 6, popularity=True, logq=True).draw()
    return None


def both_forms(model, rows: Samples, loss: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sum of the losses and gradients of the sequences of ``rows``, and of the rows as windows."""
    sequences = user_sequences(rows, model.max_history)
    items_BL, target_BL = (part.padded(NO_ITEM)[0] for part in (sequences.inputs, sequences.targets))
    target_M = target_BL[target_BL != NO_ITEM]
    negatives = negatives_of(loss, target_M)
    order = np.argsort(rows.user_N, kind="stable")  # rows in the order of the sequences' targets
    assert rows.target_N[order].tolist() == target_M.tolist()
    results = []
    for losses in (
        lambda: model.sequence_loss(items_BL, target_BL, negatives),
        lambda: model.loss(left_padded(rows.history.take(order)), target_M, negatives),
    ):
        model.zero_grad()
        total = losses().sum()
        total.backward()
        results.append([total.detach(), *(weight.grad.clone() for weight in model.parameters())])
    return results[0], results[1]


@pytest.mark.parametrize("loss", ["softmax", "bce", "sampled_softmax"])
@pytest.mark.parametrize("name", CAUSAL)
def test_the_losses_of_a_sequence_are_those_of_its_windows(name, loss):
    """With the same context: users with at most ``max_history`` + 1 interactions, dropout 0."""
    rows = samples_of(generated(9, longest=WINDOW + 1, max_history=WINDOW, seed=4, items=ITEMS))
    model = model_of(name, training="sequences")
    for dtype, close in ((torch.float64, SAME64), (torch.float32, SAME32)):
        ours, theirs = both_forms(model.to(dtype), rows, loss)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, **close)


def test_positions_from_the_newest_item_are_not_those_of_a_sequence():
    """Why sasrec counts positions from the oldest item here: with today's windows model the two forms differ."""
    rows = samples_of(generated(9, longest=WINDOW + 1, max_history=WINDOW, seed=4, items=ITEMS))
    ours, theirs = both_forms(model_of("sasrec").double(), rows, "softmax")
    assert abs(float(ours[0] - theirs[0])) > 1e-6


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_does_not_know_later_items(name):
    model = model_of(name, training="sequences").eval().double()
    items_BL = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    expected_BLD = model.states(items_BL)
    for place in range(1, WINDOW):
        changed_BL = items_BL.clone()
        changed_BL[:, place:] = 11
        changed_BL[0, place + 1 :] = NO_ITEM
        found_BLD = model.states(changed_BL)
        torch.testing.assert_close(found_BLD[:, :place], expected_BLD[:, :place], **SAME64)
        assert (found_BLD[:, place] - expected_BLD[:, place]).abs().max() > 1e-6
