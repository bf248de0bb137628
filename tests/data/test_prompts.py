"""The wording of prompts and answers."""

import dataclasses

import pytest

from tawin_nemo.config.schema import CatalogConfig, DataConfig
from tawin_nemo.data.prompts import ANSWER_MARK, ITEM_MARK, Template
from tawin_nemo.util.errors import ConfigError

ALL = [Template(name, kind=kind) for name in ("compact", "alpaca") for kind in ("title", "sid")]


def test_compact_titles_each_follow_their_own_marker():
    template = Template("compact", kind="title")
    assert template.prompt(["old", "new"]) == f"{ITEM_MARK}old{ITEM_MARK}new{ANSWER_MARK}"
    assert template.answer("next") == "next"


def test_compact_codes_are_joined_without_separators():
    template = Template("compact", kind="sid")
    assert template.prompt(["<a_1><b_2>", "<a_3><b_4>"]) == f"{ITEM_MARK}<a_1><b_2><a_3><b_4>{ANSWER_MARK}"
    assert template.answer("<a_5><b_6>") == "<a_5><b_6>"


def test_alpaca_has_the_three_sections_in_order_and_quotes_titles():
    text = Template("alpaca", kind="title").prompt(["old", "new"])
    places = [text.index(part) for part in ("### Instruction:\n", '### Input:\n"old"\n"new"\n', "### Response:\n")]
    assert places == sorted(places)
    assert text.endswith("### Response:\n")
    assert Template("alpaca", kind="title").answer("next") == '"next"'
    assert Template("alpaca", kind="sid").answer("<a_1>") == "<a_1>"


@pytest.mark.parametrize("template", ALL, ids=str)
def test_an_item_is_written_alike_in_history_and_answer(template: Template):
    history = ["first", "second", "third"]
    written = template.separator.join(template.answer(text) for text in history)
    assert template.prompt(history) == template.head + written + template.tail


@pytest.mark.parametrize("template", ALL, ids=str)
def test_only_the_compact_template_needs_marker_tokens(template: Template):
    assert "" not in template.pieces
    assert set(template.pieces) == {template.head, template.separator, template.tail} - {""}
    assert template.markers == (template.pieces if template.name == "compact" else ())


def test_the_default_is_the_default_of_the_recipe():
    assert Template() == Template(DataConfig().template, kind=CatalogConfig().kind)
    assert dataclasses.is_dataclass(Template)


@pytest.mark.parametrize(
    ("name", "kind", "shown"), [("chat", "title", "data.template=chat"), ("compact", "name", "catalog.kind=name")]
)
def test_unknown_words_are_refused_by_key(name: str, kind: str, shown: str):
    with pytest.raises(ConfigError, match=shown):
        Template(name, kind=kind)


def test_candidates_stand_behind_the_history_and_need_no_further_marker():
    compact = Template("compact", kind="title").prompt_with_candidates(["a", "b"], ["c", "d"])
    assert compact == "<|item|>a<|item|>b<|next|>c<|item|>d<|next|>"
    alpaca = Template("alpaca", kind="title").prompt_with_candidates(["a", "b"], ["c", "d"])
    assert alpaca.endswith('### Input:\n"a"\n"b"\n\n### Candidates:\n"c"\n"d"\n\n### Response:\n')
    assert "one of the candidates" in alpaca
