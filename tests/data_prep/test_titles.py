from __future__ import annotations

import polars as pl
import pytest

from tawin_nemo.data_prep.titles import (
    RESERVED,
    clean_column,
    clean_text,
    escape_reserved,
    join_json_list,
    title_faults,
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Nuts &amp; Bolts", "Nuts & Bolts"),
        ("Nuts &amp;amp; Bolts", "Nuts & Bolts"),
        ("<b>Nuts</b>&nbsp; and\n\tBolts ", "Nuts and Bolts"),
        ("Nuts<script>var a = '<b>';</script> and <!-- x --> Bolts", "Nuts and Bolts"),
        ("&lt;span class=x&gt;Nuts&lt;/span&gt;", "Nuts"),
        ("Pipe < 5 mm > 2 mm", "Pipe < 5 mm > 2 mm"),
        ("  wide   space ", "wide space"),
        ("", ""),
    ],
)
def test_clean_text(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean
    assert clean_text(clean) == clean


def test_column_equals_one_by_one() -> None:
    texts = [
        "plain",
        "a\u00a0b",
        "x\u2003y",
        " lead",
        "trail ",
        "two  spaces",
        "a & b",
        "<i>x</i>",
        None,
        "line\nbreak",
    ]
    assert clean_column(pl.Series(texts, dtype=pl.String)).to_list() == [clean_text(text or "") for text in texts]


def test_faults() -> None:
    titles = {
        "Steel Bolt 4mm": None,
        "": "empty title",
        "--- !": "empty title",
        "Steel <span class=": "markup in title",
        "Bolt var aPageStart = (new Date()).getTime();": "markup in title",
        "one two three four five": None,
        "one two three four five six": "title too long",
        "螺栓": None,
        "Fits < 5 mm": None,
        "Multi-Function (Black)": None,
        "Function (Black) Multi": None,
        "Watch: Function (Black), function (3)": None,
        "Bolt function(x) {return}": "markup in title",
        "Bolt x=function (a)": "markup in title",
        "Bolt <|endoftext|> 4mm": "reserved token in title",
        "x" * 1000: None,
        "x" * 1001: "title too long",
    }
    faults = title_faults(pl.Series(list(titles), dtype=pl.String), max_words=5)
    assert dict(zip(titles, faults, strict=True)) == titles


def test_json_lists() -> None:
    assert join_json_list('["a &amp; b", "", "<br>", "c"]', " > ") == "a & b > c"
    assert join_json_list("plain &amp; simple", " ") == "plain & simple"
    assert join_json_list("[not json", " ") == "[not json"
    assert join_json_list("[['Tools', 'Bolts'], ['Steel']]", " > ") == "Tools > Bolts > Steel"
    assert join_json_list(None, " ") == ""


def test_escaped_tokens_are_no_tokens() -> None:
    texts = pl.Series(["a <|endoftext|> b <|im_end|>", "plain < 5 | 3 >", "</s>", None], dtype=pl.String)
    escaped = escape_reserved(texts)
    assert escaped.to_list() == ["a < |endoftext|> b < |im_end|>", "plain < 5 | 3 >", "< /s>", None]
    assert not escaped.str.contains(RESERVED).any()
