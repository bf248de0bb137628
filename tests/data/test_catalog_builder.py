"""Token paths of items: exact in the context of every prompt."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import answer_paths, build_catalog
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import EOS, Tokenizer, build_tokenizer
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError

TITLES = ["Steel bolt, 1/4 inch", 'Hose 3/4" (2 pack)', "Steel washer", "Steel bolt, 1/4 inch", "x"]
IDS = [f"B{i:03d}" for i in range(len(TITLES))]
CODES = [["<a_0>", "<b_0>"], ["<a_0>", "<b_1>"], ["<a_1>", "<b_0>"], ["<a_0>", "<b_0>"], ["<a_2>"]]
#: Hypothesis tries constants of the package as well, and reserved tokens are refused (see below).
ANY_TITLE = st.text(max_size=40).filter(lambda text: "<|" not in text)
TITLE_TEMPLATES = [Template("compact", kind="title"), Template("alpaca", kind="title")]


@cache
def bpe(template: str) -> Tokenizer:
    data = DataConfig(template=template, bpe_vocab_size=500)
    return build_tokenizer(data, CatalogConfig(kind="title"), ModelConfig(), TITLES, None)


def in_context(tokenizer: Tokenizer, template: Template, history: list[str], text: str) -> list[int]:
    """The slow definition of a path: tokens(prompt + answer) after tokens(prompt), plus end of text."""
    prompt = template.prompt(history)
    head = tokenizer.fast.encode(prompt, add_special_tokens=False)
    whole = tokenizer.fast.encode(prompt + template.answer(text), add_special_tokens=False)
    assert whole[: len(head)] == head
    return [*whole[len(head) :], tokenizer.eos_id]


@pytest.mark.parametrize("template", TITLE_TEMPLATES, ids=str)
def test_paths_are_the_answer_tokens_and_end_of_text(template: Template):
    tokenizer = bpe(template.name)
    catalog = build_catalog(TITLES, IDS, TITLES, tokenizer, template, kind="title")
    for item, title in enumerate(TITLES):
        assert catalog.paths[item].tolist() == in_context(tokenizer, template, TITLES[2:], title)
        assert tokenizer.decode(catalog.paths[item]) == template.answer(title) + EOS
    assert catalog.duplicates() == [(0, 3)]
    assert (catalog.titles, catalog.external_ids, catalog.kind) == (TITLES, IDS, "title")


@pytest.mark.parametrize("name", ["compact", "alpaca"])
def test_a_code_path_has_one_token_per_code(name: str):
    template, config = Template(name, kind="sid"), CatalogConfig(kind="sid")
    tokenizer = build_tokenizer(DataConfig(template=name), config, ModelConfig(), TITLES, CODES)
    texts = ["".join(item) for item in CODES]
    catalog = build_catalog(TITLES, IDS, texts, tokenizer, template, kind="sid")
    for item, codes in enumerate(CODES):
        expected = [*tokenizer.fast.convert_tokens_to_ids(codes), tokenizer.eos_id]
        assert catalog.paths[item].tolist() == expected
    assert catalog.duplicates() == [(0, 3)]


@settings(max_examples=40)
@given(st.lists(ANY_TITLE, min_size=1, max_size=6))
def test_any_titles_are_exact_in_any_context(titles: list[str]):
    for template in TITLE_TEMPLATES:
        tokenizer = bpe(template.name)
        paths = answer_paths(titles, tokenizer, template)
        for item, title in enumerate(titles):
            assert paths[item].tolist() == in_context(tokenizer, template, titles[::-1], title)
            assert tokenizer.decode(paths[item][:-1]) == template.answer(title)


@pytest.mark.real_data
@pytest.mark.parametrize("template", TITLE_TEMPLATES, ids=str)
def test_real_titles_under_the_qwen_tokenizer_are_exact_in_real_contexts(
    template: Template, qwen_tokenizer: Path, industrial: Path
):
    items = json.loads((industrial / "Industrial_and_Scientific.item.json").read_text())
    titles = [items[str(i)]["title"] for i in range(len(items))]
    data = DataConfig(template=template.name, tokenizer=str(qwen_tokenizer))
    tokenizer = build_tokenizer(data, CatalogConfig(kind="title"), ModelConfig(), titles, None)
    odd = [title for title in titles if not title.isascii() or not title[0].isalnum() or not title[-1].isalnum()]
    chosen = [*odd[:60], *titles[::40]]
    paths = answer_paths(chosen, tokenizer, template)
    rng = np.random.default_rng(0)
    for item, title in enumerate(chosen):
        history = [titles[i] for i in rng.integers(0, len(titles), size=rng.integers(1, 5))]
        assert paths[item].tolist() == in_context(tokenizer, template, history, title)


@dataclass(frozen=True)
class _NoLineBreak(Template):
    """A prompt whose last character the tokenizer may merge with the opening quote of the answer."""

    @property
    def tail(self) -> str:
        return "\nAnswer:"


def test_an_answer_that_merges_with_the_end_of_the_prompt_is_refused():
    template = _NoLineBreak("alpaca", kind="title")
    # ':"' is frequent in these titles, so the BPE learns it as one token.
    titles = [f'size:"{number}' for number in range(50)]
    config = DataConfig(template="alpaca", bpe_vocab_size=400)
    tokenizer = build_tokenizer(config, CatalogConfig(kind="title"), ModelConfig(), titles, None)
    with pytest.raises(CatalogError, match=r"item 0: the answer '\"size:\"0\"' changes the tokens of the prompt"):
        answer_paths(titles, tokenizer, template)


class _Drifting:
    """One token per character; item "b" gets other tokens after long prompts."""

    eos_id = 1

    def encode_batch(self, texts: list[str]) -> TokenRows:
        return TokenRows.from_lists([self._encode(text) for text in texts])

    def _encode(self, text: str) -> list[int]:
        tokens = [ord(letter) for letter in text]
        return [*tokens[:-1], 7] if text.endswith("b") and "c" in text else tokens

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def test_an_item_whose_tokens_depend_on_the_history_is_refused_with_both_tokenisations():
    with pytest.raises(CatalogError, match=r"item 1 \('b'\) is tokenised as 98:'b' behind .* but as 7:'\\x07' behind"):
        answer_paths(["c", "b"], _Drifting(), Template("compact", kind="title"))  # type: ignore[arg-type]


@pytest.mark.parametrize("reserved", [EOS, "<|next|>", "<|item|>"])
def test_a_title_that_spells_a_reserved_token_is_refused(reserved: str):
    titles = ["plain", f"odd {reserved} title"]
    with pytest.raises(CatalogError, match=r"item 1 .* contains the reserved token"):
        answer_paths(titles, bpe("compact"), TITLE_TEMPLATES[0])


def test_missing_parts_are_refused():
    with pytest.raises(CatalogError, match="no items"):
        build_catalog([], [], [], bpe("compact"), TITLE_TEMPLATES[0], kind="title")
    with pytest.raises(CatalogError, match="2 titles, 1 external ids and 2 item texts"):
        build_catalog(["a", "b"], ["1"], ["a", "b"], bpe("compact"), TITLE_TEMPLATES[0], kind="title")
