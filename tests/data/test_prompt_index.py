"""What is measured of prompts, and prompts made lazily against all of them in memory."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data import prompt_index
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.prompt_encoder import PromptEncoder
from tawin_nemo.data.prompt_index import index_prompts, measured, open_index
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import encode_split, samples_of
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import DataError
from tests.data.prompt_oracle import samples_in_memory

TITLES = ["bolt", "steel washer", "a much longer title of a hose, 3/4 inch", "nut", "tape", "glue for wood", "saw"]
DATA = DataConfig(max_history=4, max_prompt_tokens=110, bpe_vocab_size=400)
TOKENIZERS = {
    name: build_tokenizer(dataclasses.replace(DATA, template=name), CatalogConfig(kind="title"), ModelConfig(), TITLES,
                          None)
    for name in ("compact", "alpaca")
}  # fmt: skip


def split_of(lists: list[list[int]]) -> Split:
    count = len(lists)
    return Split(np.arange(count) + 100, TokenRows.from_lists(lists), np.arange(count) % 7, np.arange(count))


def random_split(rows: int, longest: int = 12) -> Split:
    draw = np.random.default_rng(3)
    lengths = draw.integers(1, longest + 1, size=rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    history = TokenRows(draw.integers(0, len(TITLES), size=offsets[-1]).astype(np.int32), offsets)
    return Split(np.arange(rows), history, draw.integers(0, len(TITLES), size=rows), np.arange(rows))


@settings(max_examples=40)
@given(
    st.sampled_from([*TOKENIZERS]), st.booleans(),
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=7), min_size=1, max_size=8), st.integers(0, 60),
)  # fmt: skip
def test_samples_equal_all_prompts_in_memory(name: str, unproven: bool, lists, more: int) -> None:
    tokenizer, template = TOKENIZERS[name], Template(name)
    least = max(len(row) for row in (tokenizer.encode_batch([template.prompt([text]) for text in TITLES])[i]
                                     for i in range(len(TITLES))))  # fmt: skip
    data, split = dataclasses.replace(DATA, max_prompt_tokens=least + more), split_of(lists)
    encoder = PromptEncoder(TITLES, tokenizer, template)
    if unproven:
        encoder.from_text_because = "the test says so"
    lazy = samples_of(split, encoder, data, index_prompts(split, encoder, data))
    assert lazy.prompts.index.from_text == unproven
    expected = samples_in_memory(split, TITLES, tokenizer, template, data)
    rows = np.random.default_rng(0).integers(0, len(split), size=9)
    for ours, wanted in ((lazy, expected), (lazy.take(rows), expected.take(rows))):
        for one, other in ((ours.prompts, wanted.prompts), (ours.history, wanted.history)):
            assert one.in_memory().flat.tolist() == other.in_memory().flat.tolist()
            assert one.lengths.tolist() == other.lengths.tolist()
            assert (one.longest, one.num_tokens) == (other.longest, other.num_tokens)
        assert ours.row_N.tolist() == wanted.row_N.tolist()
    batch, same = lazy.prompt_batch(rows), expected.prompt_batch(rows)
    assert batch.prompts.flat.tobytes() == same.prompts.flat.tobytes()
    assert batch.prompts.offsets.tobytes() == same.prompts.offsets.tobytes()
    assert batch.row_B.equal(same.row_B)
    assert batch.target_B.equal(same.target_B)


def test_a_file_and_parts_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, encoder = random_split(50), PromptEncoder(TITLES, TOKENIZERS["compact"], Template())
    whole = index_prompts(split, encoder, DATA)
    monkeypatch.setattr(prompt_index, "_JOINED_ROWS", 7)
    written = open_index(tmp_path / "train", index_prompts(split, encoder, DATA, tmp_path / "train"))
    assert whole.cuts
    for name in ("kept_N", "length_N"):
        assert getattr(written, name).tolist() == getattr(whole, name).tolist()
    for name in ("from_text", "cuts", "longest", "num_tokens"):
        assert getattr(written, name) == getattr(whole, name)
    assert whole.num_tokens == int(whole.length_N.sum())
    empty = open_index(tmp_path / "none", index_prompts(split_of([]), encoder, DATA, tmp_path / "none"))
    assert (len(empty.kept_N), empty.longest) == (0, 0)


def test_the_first_row_that_cannot_fit_is_named_in_any_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_index, "_JOINED_ROWS", 2)
    data = dataclasses.replace(DATA, max_prompt_tokens=len(TOKENIZERS["compact"].encode_batch([TITLES[1]])[0]) + 3)
    with pytest.raises(DataError, match=r"item 2 .* \(row 3\)"):
        encode_split(split_of([[0], [1], [3], [1, 2], [2]]), TITLES, TOKENIZERS["compact"], Template(), data)


def test_a_sample_refutes_a_wrong_proof(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    template = Template("compact", kind="sid")
    codes = [["<a>"], ["<b>"], ["<a><b>"]]
    tokenizer = build_tokenizer(DATA, CatalogConfig(kind="sid"), ModelConfig(), TITLES, codes)
    monkeypatch.setattr("tawin_nemo.data.prompt_encoder.unproven_because", lambda *unused: "")
    monkeypatch.setattr(prompt_index.log.parent, "propagate", True)
    samples = encode_split(split_of([[0, 1], [0]]), ["<a>", "<b>", "<a><b>"], tokenizer, template, DATA)
    assert "have other tokens" in caplog.text
    expected = samples_in_memory(split_of([[0, 1], [0]]), ["<a>", "<b>", "<a><b>"], tokenizer, template, DATA)
    assert samples.prompts.in_memory().flat.tolist() == expected.prompts.in_memory().flat.tolist()


def test_whole_histories_are_never_cut() -> None:
    split, encoder = random_split(9, longest=30), PromptEncoder(TITLES, TOKENIZERS["compact"], Template())
    prompts = measured(split.history, encoder, None)
    assert prompts.in_memory().flat.tolist() == encoder.encode_full_prompts(split.history).flat.tolist()
    assert prompts.lengths.tolist() == encoder.encode_full_prompts(split.history).lengths.tolist()


def tokens_kept(tokenizer: Tokenizer, rows: int, folder: Path) -> tuple[int, int]:
    """Bytes that measuring allocates at most, and that samples take which another process has measured."""
    split, encoder = random_split(rows), PromptEncoder(TITLES, tokenizer, Template())
    encoder.join(TokenRows.from_lists([[0]]))
    tracemalloc.start()
    index = index_prompts(split, encoder, DATA, folder / str(rows))
    peak = tracemalloc.get_traced_memory()[1]
    del index
    before = tracemalloc.get_traced_memory()[0]
    samples = samples_of(
        split, encoder, DATA, open_index(folder / str(rows), index_prompts(split_of([]), encoder, DATA))
    )
    samples.prompt_batch(np.arange(5))
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return peak, kept


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in memory would take 400 bytes a row, two numbers of 4 bytes 8."""
    monkeypatch.setattr(prompt_index, "_JOINED_ROWS", 1 << 13)
    (few, kept_few), (many, kept_many) = (
        tokens_kept(TOKENIZERS["compact"], rows, tmp_path) for rows in (40_000, 120_000)
    )
    assert many - few < 80_000
    assert kept_many - kept_few < 80_000
