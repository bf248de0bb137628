"""Splits encoded as prompts."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import Samples, encode_split
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError

TITLES = ["bolt", "steel washer", "a much longer title of a hose, 3/4 inch", "nut", "tape", "glue for wood", "saw"]
DATA = DataConfig(max_history=4, max_prompt_tokens=300, bpe_vocab_size=400)
TEMPLATE = Template(DATA.template, kind="title")
TOKENIZER = build_tokenizer(DATA, CatalogConfig(kind="title"), ModelConfig(), TITLES, None)


def split_of(histories: list[list[int]]) -> Split:
    count = len(histories)
    return Split(np.arange(count) + 100, TokenRows.from_lists(histories), np.arange(count) % 7, np.arange(count))


def encode(histories: list[list[int]], data: DataConfig = DATA) -> Samples:
    return encode_split(split_of(histories), TITLES, TOKENIZER, TEMPLATE, data)


def tokens(history: list[int]) -> list[int]:
    return TOKENIZER.fast.encode(TEMPLATE.prompt([TITLES[item] for item in history]), add_special_tokens=False)


def test_rows_are_the_template_s_prompts_of_the_newest_items():
    histories = [[0], [1, 2, 3], [0, 1, 2, 3, 4, 5]]
    samples = encode(histories)
    for row, history in enumerate(histories):
        assert samples.prompts[row].tolist() == tokens(history[-4:])
        assert samples.history[row].tolist() == history[-4:]
    assert samples.user_N.tolist() == [100, 101, 102]
    assert samples.target_N.tolist() == [0, 1, 2]
    assert samples.row_N.tolist() == [0, 1, 2]


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), max_size=8), st.integers(50, 120))
def test_long_prompts_lose_their_oldest_items_whole_and_no_more_than_needed(histories, budget: int):
    samples = encode(histories, dataclasses.replace(DATA, max_prompt_tokens=budget))
    assert len(samples) == len(histories)
    for row, history in enumerate(histories):
        fitting = [history[-kept:] for kept in range(1, 5) if len(tokens(history[-kept:])) <= budget]
        assert samples.history[row].tolist() == fitting[-1]
        assert samples.prompts[row].tolist() == tokens(fitting[-1])


def test_truncation_happens_at_this_budget():
    """The property above would hold vacuously with a budget that every prompt meets."""
    assert len(tokens([2, 2, 2, 2])) > 120
    assert len(tokens([2])) <= 50


def test_an_item_that_does_not_fit_alone_is_named_with_the_remedy():
    needed = len(tokens([2]))
    with pytest.raises(
        DataError, match=rf"max_prompt_tokens={needed - 1}: item 2 \('a much.*{needed} tokens \(row 1\)"
    ):
        encode([[0], [1, 2]], dataclasses.replace(DATA, max_prompt_tokens=needed - 1))


def test_a_subset_keeps_targets_and_row_numbers():
    samples = encode([[0], [1], [2], [3]])
    part = samples.take(np.array([3, 1]))
    assert part.row_N.tolist() == [3, 1]
    batch = part.prompt_batch(np.array([1, 0, 1]))
    assert batch.row_B.tolist() == [1, 3, 1]
    assert batch.target_B.tolist() == [1, 3, 1]
    assert batch.prompts[1].tolist() == tokens([3])
    assert len(batch) == 3


def test_an_empty_split_gives_empty_samples():
    assert len(encode([])) == 0


def test_columns_of_unequal_length_are_refused():
    samples = encode([[0], [1]])
    with pytest.raises(ValueError, match="differ in length"):
        dataclasses.replace(samples, target_N=samples.target_N[:1])
