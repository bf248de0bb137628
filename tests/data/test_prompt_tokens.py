"""Prompts joined from pieces against prompts tokenised whole."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import PromptEncoder
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.types import TokenRows

TITLES = ["bolt", 'hose 3/4"', " washer (2)", "ünïcode — dash", "two\nlines\n", "", "steel, long"]
CODES = [[f"<a_{i % 2}>", f"<b_{i}>"] for i in range(len(TITLES))]
TEMPLATES = [Template(name, kind=kind) for name in ("compact", "alpaca") for kind in ("title", "sid")]


@cache
def tokenizer_for(template: Template) -> Tokenizer:
    data = DataConfig(template=template.name, bpe_vocab_size=400)
    codes = CODES if template.kind == "sid" else None
    return build_tokenizer(data, CatalogConfig(kind=template.kind), ModelConfig(), TITLES, codes)


def whole(encoder: PromptEncoder, histories: TokenRows) -> list[list[int]]:
    rows = encoder.encode_full_prompts(histories)
    return [rows[row].tolist() for row in range(len(rows))]


def joined(encoder: PromptEncoder, histories: TokenRows) -> list[list[int]]:
    rows = encoder.join(histories)
    return [rows[row].tolist() for row in range(len(rows))]


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
@settings(max_examples=40)
@given(lists=st.lists(st.lists(st.integers(0, len(TITLES) - 1), max_size=5), max_size=6))
def test_joined_pieces_equal_whole_prompts(template: Template, lists):
    texts = TITLES if template.kind == "title" else ["".join(item) for item in CODES]
    encoder = PromptEncoder(texts, tokenizer_for(template), template)
    histories = TokenRows.from_lists(lists)
    assert joined(encoder, histories) == whole(encoder, histories)
    for row, history in enumerate(lists):
        text = template.prompt([texts[item] for item in history])
        assert encoder.encode(histories)[row].tolist() == tokenizer_for(template).encode_batch([text])[0].tolist()


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["compact", "alpaca"])
def test_real_titles_under_the_qwen_tokenizer(name: str, qwen_tokenizer: Path, industrial: Path):
    items = json.loads((industrial / "Industrial_and_Scientific.item.json").read_text())
    titles = [items[str(i)]["title"] for i in range(0, len(items), 3)]
    template, catalog = Template(name, kind="title"), CatalogConfig(kind="title")
    data = DataConfig(template=name, tokenizer=str(qwen_tokenizer))
    encoder = PromptEncoder(titles, build_tokenizer(data, catalog, ModelConfig(), titles, None), template)
    # Every title once in the middle and once at the end.
    order = np.random.default_rng(0).permutation(len(titles))
    histories = TokenRows.from_lists([[int(item), int(order[item])] for item in order])
    assert joined(encoder, histories) == whole(encoder, histories)


def test_a_tokenizer_that_merges_across_joints_gets_whole_prompts():
    """The codes <a> and <b> beside each other spell a third code."""
    template = Template("compact", kind="sid")
    tokenizer = build_tokenizer(
        DataConfig(template="compact"), CatalogConfig(kind="sid"), ModelConfig(), TITLES, [["<a>"], ["<b>"], ["<a><b>"]]
    )
    encoder = PromptEncoder(["<a>", "<b>", "<a><b>"], tokenizer, template)
    histories = TokenRows.from_lists([[0, 1]])
    assert joined(encoder, histories) != whole(encoder, histories)
    assert encoder.encode(histories)[0].tolist() == whole(encoder, histories)[0]
