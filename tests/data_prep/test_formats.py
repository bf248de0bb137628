"""One log written in every input format gives the same samples; the page's table of formats is made from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tawin_nemo.data.interactions import Dataset
from tawin_nemo.data_prep.prepare import detect
from tawin_nemo.data_prep.sources import SOURCES
from tawin_nemo.types import SPLITS
from tests.data_prep.formats import FORMATS, README, Format, load, page, samples, title

#: Formats whose ids are numbers, and those without titles.
NUMBERED, UNTITLED = ("MovieLens",), ("CSV without header",)


def in_ids(dataset: Dataset, split: str) -> list[tuple[str | None, list[str], str]]:
    """User, history and target of each row, in external ids."""
    rows, names = getattr(dataset, split), dataset.items.external_ids
    users = dataset.user_ids(rows.user_N)
    return [
        (users[row], [names[item] for item in rows.history[row]], names[rows.target_N[row]]) for row in range(len(rows))
    ]


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_the_same_samples_in_every_format(entry: Format, tmp_path: Path) -> None:
    dataset = load(entry, tmp_path)
    assert dataset.manifest["source"] == entry.dataset
    numbered = entry.name.startswith(NUMBERED)
    for split, expected in samples().items():
        rows = getattr(dataset, split)
        assert rows.target_N.tolist() == [target.item for target, _ in expected]
        assert [row.tolist() for row in (rows.history[n] for n in range(len(rows)))] == [
            [one.item for one in history] for _, history in expected
        ]
        assert rows.user_N.tolist() == [target.user for target, _ in expected]
        if not entry.ready_made:
            assert rows.time_N.tolist() == [target.time for target, _ in expected]
        names = [
            (str(t.user + 10), [str(r.item + 100) for r in h], str(t.item + 100)) if numbered
            else (t.u, [r.i for r in h], t.i)
            for t, h in expected
        ]  # fmt: skip
        if entry.name == "MiniOneRec CSV":  # it has numbers of items only
            names = [(t.u, [str(r.item) for r in h], str(t.item)) for t, h in expected]
        assert in_ids(dataset, split) == names
    if entry.name in UNTITLED:
        assert not dataset.has_titles
        assert dataset.items.titles == dataset.items.external_ids
    else:
        assert dataset.has_titles
        assert dataset.items.titles == [title(item) for item in range(len(dataset.items))]


@pytest.mark.parametrize("entry", [entry for entry in FORMATS if not entry.options], ids=lambda entry: entry.name)
def test_the_format_is_detected_by_content_and_can_be_named(entry: Format, tmp_path: Path) -> None:
    named = load(entry, tmp_path, source=entry.dataset)
    assert detect(tmp_path / "raw") == entry.dataset
    assert [len(getattr(named, split)) for split in SPLITS] == [len(rows) for rows in samples().values()]


def test_every_source_is_in_the_table() -> None:
    assert {entry.dataset for entry in FORMATS} | {"synthetic", "candidates"} == set(SOURCES)


def test_the_table_on_the_page_is_the_one_that_the_formats_give() -> None:
    """``python -m tests.data_prep.formats`` writes it."""
    text = README.read_text(encoding="utf-8")
    assert page(text) == text
