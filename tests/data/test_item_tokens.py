"""Prompts with one token per item behind its text: places, text around them, what is refused."""

import numpy as np
import pytest

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.interactions import Split
from tawin_nemo.data.item_tokens import encode_marked, marked
from tawin_nemo.data.jinja_prompts import JinjaTemplate
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import PromptEncoder, encode_split
from tawin_nemo.data.tokenizer import Tokenizer, build_tokenizer
from tawin_nemo.types import FIRST_ITEM_TOKEN, TokenRows
from tawin_nemo.util.errors import DataError
from tests.data.chat_tokenizers import instruct_tokenizer

TEXTS = ["Hope", "The Beatles", "!!!", "ABBA 2", "Björk"]
JINJA = (
    "{% for item in items %}{{ item.text }}, {% endfor %}next:{% for item in candidates %} {{ item.text }}{% endfor %}"
)
TEMPLATES = [Template("compact"), Template("alpaca"), JinjaTemplate(source=JINJA)]
HISTORIES = TokenRows.from_lists([[1, 0], [4], [], [2, 2, 3]])
SHOWN = TokenRows.from_lists([[3, 1], [0, 4], [2, 1], [1, 4]])


def tokenizer_for(template: Template) -> Tokenizer:
    data = DataConfig(tokenizer="bpe", bpe_vocab_size=320)
    return build_tokenizer(data, CatalogConfig(), ModelConfig(), TEXTS, None, template=template)


def by_hand(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token by token, the mark read character by character."""
    tokens: list[int] = []
    text, number = "", None
    for character in [*prompt, ""]:
        if character == "\ue000":
            number = ""
        elif character == "\ue001":
            tokens += [*tokenizer.encode_batch([text])[0].tolist(), FIRST_ITEM_TOKEN + int(number)]
            text, number = "", None
        elif number is not None:
            number += character
        else:
            text += character
    return [*tokens, *tokenizer.encode_batch([text])[0].tolist()]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_an_item_stands_behind_every_text(template):
    tokenizer = tokenizer_for(template)
    encoder = PromptEncoder(TEXTS, tokenizer, template, item_tokens=True)
    alone, both = encoder.encode(HISTORIES), encoder.encode_with_candidates(HISTORIES, SHOWN)
    for row in range(len(HISTORIES)):
        history, shown = HISTORIES[row].tolist(), SHOWN[row].tolist()
        for tokens, items in ((alone[row], history), (both[row], [*history, *shown])):
            assert (tokens[tokens >= FIRST_ITEM_TOKEN] - FIRST_ITEM_TOKEN).tolist() == items
        texts = [[marked(TEXTS[item], item) for item in items] for items in (history, shown)]
        assert both[row].tolist() == by_hand(tokenizer, template.prompt_of(history, texts[0], shown, texts[1]))


def test_without_its_items_the_compact_prompt_is_the_one_of_texts():
    tokenizer = tokenizer_for(TEMPLATES[0])
    with_items, texts = (PromptEncoder(TEXTS, tokenizer, TEMPLATES[0], item_tokens=wanted) for wanted in (True, False))
    for ours, theirs in (
        (with_items.encode(HISTORIES), texts.encode(HISTORIES)),
        (with_items.encode_with_candidates(HISTORIES, SHOWN), texts.encode_with_candidates(HISTORIES, SHOWN)),
    ):
        for row in range(len(HISTORIES)):
            assert ours[row][ours[row] < FIRST_ITEM_TOKEN].tolist() == theirs[row].tolist()


def test_the_begin_of_text_stands_once_in_front(tmp_path):
    from tokenizers import processors

    tokenizer = Tokenizer.load(instruct_tokenizer(tmp_path))
    bos = tokenizer.backend.token_to_id("<|im_start|>")
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    rows = encode_marked(tokenizer, [f"{marked('steel', 3)} and {marked('tape', 0)}:", "steel"])
    assert [row.tolist().count(bos) for row in (rows[0], rows[1])] == [1, 1]
    assert rows[0][0] == rows[1][0] == bos


def test_item_tokens_count_when_a_prompt_is_cut():
    tokenizer, user = tokenizer_for(TEMPLATES[0]), np.zeros(1, np.int64)
    split = Split(user, TokenRows.from_lists([[0, 3, 0, 3]]), user, user)
    longest = int(PromptEncoder(TEXTS, tokenizer, TEMPLATES[0]).encode(split.history).lengths[0])
    data = DataConfig(max_history=4, max_prompt_tokens=longest)
    plain = encode_split(split, TEXTS, tokenizer, TEMPLATES[0], data)
    cut = encode_split(split, TEXTS, tokenizer, TEMPLATES[0], data, item_tokens=True)
    assert cut.prompts.lengths[0] <= longest
    assert len(cut.history[0]) < len(plain.history[0]) == 4
    assert (cut.prompts.in_memory().flat >= FIRST_ITEM_TOKEN).sum() == len(cut.history[0])


def test_a_title_with_a_character_of_a_mark_is_refused():
    with pytest.raises(DataError, match=r"item 1, .*U\+E000"):
        PromptEncoder(["a", "b\ue000"], tokenizer_for(TEMPLATES[0]), TEMPLATES[0], item_tokens=True)
