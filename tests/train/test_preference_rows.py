"""NAPO's margin and its state; searched rejected items: when, for which rows, and what a checkpoint must hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tawin_nemo.config.schema import PreferenceConfig
from tawin_nemo.data.batches import BatchStream
from tawin_nemo.data.samples import Samples
from tawin_nemo.train.preference_negatives import SearchedNegatives
from tawin_nemo.train.preference_rows import BatchMargin
from tawin_nemo.types import NO_ITEM, DataParallel, TokenRows
from tawin_nemo.util.errors import CheckpointError, ConfigError

NAPO = PreferenceConfig(enabled=True, algorithm="napo", aux="x", gamma0=2.0, alpha=0.5, momentum=0.75)


def test_the_margin_of_a_batch_is_that_of_all_replicas_and_moves_its_baseline():
    alone, apart = BatchMargin(NAPO, DataParallel()), []
    for batch in ([0.2, 0.4, 0.9], [0.8, 0.8, 0.5], [0.1, 0.2, 0.3]):
        gamma, logged = alone.of_batch(np.array(batch))
        apart.append((gamma, logged["confidence"], logged["confidence_baseline"]))
    means = [0.5, 0.7, 0.2]
    baselines = [0.5, 0.75 * 0.5 + 0.25 * 0.7, 0.75 * (0.75 * 0.5 + 0.25 * 0.7) + 0.25 * 0.2]
    expected = [(1 + 0.5 * (mean - before)) * 2.0 for mean, before in zip(means, [0.5, *baselines], strict=False)]
    assert [row[0] for row in apart] == pytest.approx(expected)
    assert [row[2] for row in apart] == pytest.approx(baselines)
    halves = {0: [0.2], 1: [0.4, 0.9]}
    both = [(sum(part), len(part)) for part in halves.values()]
    for rank, part in halves.items():
        margin = BatchMargin(NAPO, DataParallel(rank, 2, lambda value: both))
        assert margin.of_batch(np.array(part))[1]["confidence"] == pytest.approx(0.5)


def test_the_baseline_comes_back_and_its_absence_is_an_error():
    margin = BatchMargin(NAPO, DataParallel())
    margin.of_batch(np.array([0.4]))
    margin.of_batch(np.array([0.6]))
    again = BatchMargin(NAPO, DataParallel())
    again.restore(margin.state(), 2)
    assert again.of_batch(np.array([0.3])) == margin.of_batch(np.array([0.3]))
    with pytest.raises(CheckpointError, match=r"step 2 holds no running confidence.*preference.margin=dynamic"):
        BatchMargin(NAPO, DataParallel()).restore({}, 2)
    fixed = BatchMargin(replace(NAPO, margin="fixed"), DataParallel())
    fixed.restore({}, 2)
    assert fixed.of_batch(np.zeros(0)) == (2.0, {})


ROWS, ITEMS = 10, 8


class Engine:
    """Lists all items, beginning with ``weight_version``."""

    dp, spread, weight_version = None, 1, 0

    def __init__(self):
        self.searched = []

    def receive_weights(self):
        pass

    def search(self, prompts, width, *, token_budget=None):
        self.searched.append(sorted(int(prompts[row][0]) for row in range(len(prompts))))
        items = (torch.arange(width) + self.weight_version) % ITEMS

        class Found:
            items_BW = items.repeat(len(prompts), 1)

        return Found


def searched(engine, **changes):
    leaf_I = np.arange(ITEMS)
    samples = Samples(
        TokenRows.from_lists([[row] for row in range(ROWS)]), np.arange(ROWS) % 4, np.arange(ROWS),
        TokenRows.from_lists([[7]] * ROWS),
    )  # fmt: skip
    cfg = PreferenceConfig(enabled=True, negatives="beam", num_negatives=2, **changes)
    stream = BatchStream(ROWS, 3, seed=1)
    return SearchedNegatives(cfg, samples, np.arange(ROWS), stream, engine, leaf_I, DataParallel(), total=7), stream


def test_searches_cover_the_steps_up_to_the_next_and_leave_out_the_target():
    engine = Engine()
    negatives, stream = searched(engine, search_every=2)
    due = [negatives.prepare(step) for step in range(7)]
    assert due == [True, False] * 3 + [True]
    for place, step in enumerate((0, 2, 4)):
        assert engine.searched[place] == sorted({*stream.batch(step).tolist(), *stream.batch(step + 1).tolist()})
    assert engine.searched[3] == sorted(set(stream.batch(6).tolist()))  # the last step of the run
    again, _ = searched(Engine(), search_every=2)
    again.prepare(4)
    rows = stream.batch(5)
    for row, items in zip(rows.tolist(), again.items(rows, 5).tolist(), strict=True):
        listed = [(item + 4) % ITEMS for item in range(3)]
        assert items == [item for item in listed if item != row % 4][:2]
        assert NO_ITEM not in items


def test_the_result_of_a_search_belongs_to_the_checkpoint_until_the_next():
    negatives, stream = searched(Engine(), search_every=2)
    negatives.prepare(2)
    rows = stream.batch(3)
    assert negatives.state(4) == {}
    state = negatives.state(3)
    again, _ = searched(Engine(), search_every=2)
    again.restore(state, 3)
    assert not again.prepare(3)
    assert np.array_equal(again.items(rows, 3), negatives.items(rows, 3))
    again.restore({}, 4)
    with pytest.raises(CheckpointError, match=r"step 3 holds no rejected items.*preference.search_every=2"):
        again.restore({}, 3)


def test_once_per_epoch_is_the_default():
    engine = Engine()
    negatives, _ = searched(engine)
    assert [step for step in range(7) if negatives.prepare(step)] == [0, 4]  # 10 rows in batches of 3


def test_more_rejected_items_than_the_catalog_has_are_an_error():
    negatives, _ = searched(Engine())
    negatives._leaf_I = torch.zeros(ITEMS, dtype=torch.long)  # all items are written alike
    with pytest.raises(ConfigError, match=r"preference.num_negatives=2 asks for more wrong items .* at most 0"):
        negatives.prepare(0)
