"""Title faults are shown on screen, with their key; a reserved token in a title is one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig, PrepareConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.interactions import Dataset, load_dataset
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.samples import encode_split
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.data_prep.prepare import prepare
from tawin_nemo.util.errors import CatalogError, DataError
from tests.data_prep.formats import START, table

NAMES = [f"i{n}" for n in range(10)]


def write(root: Path, **titles: str) -> None:
    """A log in which 20 users take all of 10 items; ``titles`` replace those of some items."""
    rows = [(f"u{user:02d}", item, START + 60 * (n + user % 7)) for user in range(20) for n, item in enumerate(NAMES)]
    table(root / "log.csv", "user,item,time", rows)
    items = [(name, titles.get(name, f"Steel bolt number {n}")) for n, name in enumerate(NAMES)]
    table(root / "items.csv", "item,title", items)


def run(root: Path, **options: Any) -> Dataset:
    return load_dataset(
        prepare("table", root, root / "out", prepare=PrepareConfig(**options), data=DataConfig(), seed=0)
    )  # fmt: skip


def test_faults_are_counted_on_screen_with_examples_and_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, i1="<3 <span class=", i2="a <|endoftext|> b", i3="x" * 3000, i4="--", i5="Multi-Function (Black)")
    dataset = run(tmp_path)
    assert dataset.items.external_ids == ["i0", "i5", "i6", "i7", "i8", "i9"]
    text = caplog.text
    assert "1 item skipped (markup in title), e.g. i1 '<3 <span class='" in text
    assert "1 item skipped (reserved token in title; see prepare.reserved_tokens=escape), e.g. i2" in text
    assert "title too long; see prepare.max_title_words and prepare.max_title_chars), e.g. i3 'xxx" in text
    assert "(3,000 characters)" in text
    assert "1 item skipped (empty title), e.g. i4 '--'" in text
    assert dataset.manifest["problems"]["refused_items"]["title too long"]["first_items"] == ["i3"]


def test_a_reserved_token_ends_no_training(tmp_path: Path) -> None:
    """Dropped or escaped, the catalog can be built; as it is, it could not."""
    write(tmp_path, i2="a <|endoftext|> b")

    def catalog(titles: list[str], ids: list[str]) -> int:
        template = Template("compact")
        tokenizer = build_tokenizer(
            DataConfig(tokenizer="bpe", bpe_vocab_size=300), CatalogConfig(), ModelConfig(), titles, None, []
        )
        return len(build_catalog(titles, ids, titles, tokenizer, template, kind="title"))

    with pytest.raises(CatalogError, match=r"reserved token .*prepare\.reserved_tokens=escape"):
        catalog(["a <|endoftext|> b", "c"], ["i2", "i3"])
    dropped = run(tmp_path).items
    assert catalog(dropped.titles, dropped.external_ids) == 9
    escaped = run(tmp_path, reserved_tokens="escape").items
    assert escaped.titles[2] == "a < |endoftext|> b"
    assert catalog(escaped.titles, escaped.external_ids) == 10


def test_a_title_of_3000_characters_can_be_admitted_and_names_item_and_key_where_it_does_not_fit(
    tmp_path: Path,
) -> None:
    write(tmp_path, i3="x" * 3000)
    dataset = run(tmp_path, max_title_chars=3000)
    titles = dataset.items.titles
    assert len(titles[3]) == 3000
    data = DataConfig(tokenizer="bpe", bpe_vocab_size=300, max_prompt_tokens=40)
    tokenizer = build_tokenizer(data, CatalogConfig(), ModelConfig(), titles[:3], None, [])
    message = r"item 3 \('x{60}'\.\.\., 3,000 characters\) alone .*prepare\.max_title_chars"
    with pytest.raises(DataError, match=message) as caught:
        encode_split(dataset.train, titles, tokenizer, Template("compact"), data)
    assert len(str(caught.value)) < 500


def test_other_texts_are_always_escaped(tmp_path: Path) -> None:
    write(tmp_path)
    rows = [(name, f"Steel bolt {n}", "text <|im_end|> more") for n, name in enumerate(NAMES)]
    table(tmp_path / "items.csv", "item,title,description", rows)
    assert set(run(tmp_path).items.descriptions) == {"text < |im_end|> more"}
    assert np.unique(run(tmp_path).items.titles).size == 10
