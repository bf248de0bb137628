"""Catalogs of semantic IDs change as those of titles do; the one to start with may come from a file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tawin_nemo.commands.serve import first_catalog
from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import CatalogConfig, DataConfig, ModelConfig
from tawin_nemo.data.catalog_builder import build_catalog
from tawin_nemo.data.prompts import Template
from tawin_nemo.data.tokenizer import build_tokenizer
from tawin_nemo.serve.engine.catalog import NewItem, PromptFormat, ServedCatalog
from tawin_nemo.serve.engine.items_file import read_items
from tawin_nemo.util.errors import CatalogError, DataError
from tests.serve import scene

CODES = [["<a_1>", "<b_1>"], ["<a_1>", "<b_2>"], ["<a_2>", "<b_1>"]]
TEMPLATE = Template("compact", "sid")


@pytest.fixture(scope="module")
def coded() -> ServedCatalog:
    cfg = CatalogConfig(kind="sid", index="x")
    tokenizer = build_tokenizer(DataConfig(), cfg, ModelConfig(), [], CODES)
    texts, names = ["".join(codes) for codes in CODES], ["x", "y", "z"]
    catalog = build_catalog(names, names, texts, tokenizer, TEMPLATE, kind="sid")
    return ServedCatalog.of(catalog, texts, PromptFormat(tokenizer, TEMPLATE, 3, 50))


def test_items_of_codes_come_and_go(coded: ServedCatalog) -> None:
    changed = coded.changed([NewItem("new", "a lamp", ("<a_2>", "<b_2>"))], ["x"], 2)
    assert changed.trie.num_items == 3
    assert [changed.external_ids[number] for number in changed.number_J] == ["y", "z", "new"]
    vocabulary = coded.prompt_format.tokenizer.fast.get_vocab()
    assert changed.paths[3].tolist() == [vocabulary["<a_2>"], vocabulary["<b_2>"], coded.prompt_format.tokenizer.eos_id]
    assert np.array_equal(changed.prompt([0]).flat, coded.prompt([0]).flat)  # a removed item in a history
    assert changed.fingerprint != coded.fingerprint
    assert coded.trie.num_items == 3  # the old one is as it was


def test_an_item_that_comes_back_has_its_number_again_unless_it_changed(coded: ServedCatalog) -> None:
    """Otherwise a catalog whose items come and go for months would grow without end."""
    same, other = NewItem("x", "x", ("<a_1>", "<b_1>")), NewItem("x", "another title", ("<a_1>", "<b_1>"))
    gone = coded.changed([], ["x"], 2)
    for version in range(3, 7):
        back = gone.changed([same], [], version)
        assert (len(back.titles), back.number_J.tolist()) == (3, [0, 1, 2])
        assert back.fingerprint == coded.fingerprint
        gone = back.changed([], ["x"], version)
    changed = gone.changed([other], [], 8)
    assert changed.number_J.tolist() == [1, 2, 3]
    assert changed.changed([same], ["x"], 9).number_J.tolist() == [1, 2, 4]  # the newest one counts
    assert coded.replaced([same, NewItem("y", "y", ("<a_1>", "<b_2>"))], 2).number_J.tolist() == [0, 1]
    with pytest.raises(CatalogError, match="named twice: 'x'"):
        gone.changed([same, same], [], 9)


def test_codes_that_the_model_never_saw_and_items_without_codes_are_refused(coded: ServedCatalog) -> None:
    with pytest.raises(CatalogError, match="no tokens for"):
        coded.changed([NewItem("new", "a lamp", ("<a_9>",))], [], 2)
    with pytest.raises(CatalogError, match="wants its codes"):
        coded.changed([NewItem("new", "a lamp")], [], 2)


def test_a_shorter_code_is_a_path_of_its_own(coded: ServedCatalog) -> None:
    shorter = coded.changed([NewItem("new", "a lamp", ("<a_2>",))], [], 2)
    assert shorter.trie.num_leaves == 4


def test_a_history_is_shortened_as_in_training_and_one_that_cannot_be_is_refused(coded: ServedCatalog) -> None:
    def limited(tokens: int) -> ServedCatalog:
        prompt_format = PromptFormat(coded.prompt_format.tokenizer, TEMPLATE, 3, tokens)
        return ServedCatalog(
            1, prompt_format, coded.titles, coded.external_ids, coded.texts, coded.paths, coded.live_I, coded.trie
        )

    whole = coded.prompt([2, 0, 1])
    assert len(whole.flat) == 8  # two markers, two codes an item
    assert np.array_equal(coded.prompt([2, 2, 0, 1]).flat, whole.flat)  # max_history
    assert np.array_equal(limited(7).prompt([2, 0, 1]).flat, coded.prompt([0, 1]).flat)
    with pytest.raises(DataError, match="alone makes a prompt of 4 tokens"):
        limited(3).prompt([1])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: JSONDecodeError"),
        ("[]", "line 2: TypeError"),
        ('{"external_id": "a", "title": ""}', "line 2: TypeError"),
        ('{"external_id": 3, "title": "x"}', "line 2: TypeError"),
        ('{"external_id": "a", "title": "x", "codes": [1]}', "line 2: TypeError"),
        ('{"title": "x"}', "line 2: KeyError"),
    ],
)  # fmt: skip
def test_a_file_of_items_is_read_line_by_line(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"external_id": "b", "title": "good", "codes": ["<a_1>"]}\n\n')
    assert read_items(file) == [NewItem("b", "good", ("<a_1>",))]
    file.write_text('{"external_id": "b", "title": "good"}\n' + line)
    with pytest.raises(CatalogError, match=words):
        read_items(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CatalogError, match="cannot be read"):
        read_items(file)


def test_a_server_may_start_with_a_catalog_of_its_own(tmp_path: Path) -> None:
    here, file = scene.first_catalog(), tmp_path / "items.jsonl"
    lines = [{"external_id": scene.IDS[7], "title": scene.TITLES[7]}, {"external_id": "N", "title": "old new lamp"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    catalog = build_catalog(scene.TITLES, scene.IDS, scene.TITLES, scene.tokenizer(), Template(), kind="title")
    world = SimpleNamespace(
        tokenizer=scene.tokenizer(), template=Template(), catalog=catalog, item_texts=scene.TITLES, export=None,
        recipe=load_recipe(None, ["data.dataset=synthetic", f"serve.catalogue={file}"]),
    )  # fmt: skip
    made = first_catalog(world)  # type: ignore[arg-type]
    assert made.version == 1
    assert [made.titles[number] for number in made.number_J] == [line["title"] for line in lines]
    assert made.number_J.tolist() == [7, len(scene.TITLES)]
    assert made.fingerprint != here.fingerprint
