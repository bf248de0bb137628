"""The trie file of an export and the one-file logits processor, against the paths themselves."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tawin_nemo.catalog import tawin_trie
from tawin_nemo.catalog.export_files import read_catalog, trie_rows, write_catalog
from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.tawin_trie import TokenTrie, TrieLogitsProcessor
from tawin_nemo.catalog.trie import TokenTrie as OwnTrie
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError

VOCAB, EOS = 23, 7
#: Shared prefixes, the end token at inner nodes, a forced tail, two items with one path.
PATHS = [[3, 9, EOS], [3, 9, 4, EOS], [3, 2, 2, 2, EOS], [5, EOS], [3, 9, EOS], [0, EOS]]


def catalog_of(paths: list[list[int]], kind: str = "title") -> Catalog:
    rows, names = TokenRows.from_lists(paths), [f"B{item:02}" for item in range(len(paths))]
    return Catalog([f"title {name}" for name in names], names, kind, rows, OwnTrie.from_paths(rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_catalog(tmp_path, catalog_of(PATHS), [[] for _ in PATHS])
    return tmp_path


@pytest.fixture
def trie(folder: Path) -> TokenTrie:
    return TokenTrie.load(folder / "trie.safetensors")


def admissible(paths: list[list[int]], written: list[int]) -> list[int]:
    """By definition: what the paths that begin so go on with; the end token where none does."""
    following = {path[len(written)] for path in paths if path[: len(written)] == written and len(path) > len(written)}
    return sorted(following) or [EOS]


def expected(paths: list[list[int]], written: list[int], scores_V: Tensor, space: str) -> Tensor:
    allowed = admissible(paths, written)
    result = torch.full_like(scores_V, -torch.inf)
    among = scores_V[allowed] if space == "trie" else scores_V
    result[allowed] = scores_V[allowed] - among.logsumexp(0)
    return result


def prefixes(paths: list[list[int]]) -> list[list[int]]:
    """All beginnings of paths, finished ones, what follows them, and beginnings of nothing."""
    inside = {tuple(path[:length]) for path in paths for length in range(len(path) + 1)}
    return [list(prefix) for prefix in sorted(inside)] + [[*paths[0], EOS], [*paths[0], EOS, 3], [11], [3, 11, 9], [20]]


@pytest.mark.parametrize("seed", range(6))
def test_rows_hold_exactly_the_paths(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(8, 8 + rng.integers(2, 6), rng.integers(1, 6)).tolist() for _ in range(rng.integers(1, 90))]
    paths = [[*body, EOS] for body in bodies]
    write_catalog(tmp_path, catalog_of(paths), [[] for _ in paths])
    trie = TokenTrie.load(tmp_path / "trie.safetensors")
    nodes = {tuple(path[:length]) for path in paths for length in range(len(path) + 1)}
    assert len(trie.offsets) == len(nodes) + 1
    assert len(trie.tokens) == len(nodes) - 1
    for prefix in nodes:
        node = trie.follow(torch.tensor([prefix], dtype=torch.long), torch.zeros(1, dtype=torch.long))
        first, last = trie.offsets[node], trie.offsets[node + 1]
        follow = {
            path[len(prefix)] for path in paths if tuple(path[: len(prefix)]) == prefix and len(path) > len(prefix)
        }
        assert trie.tokens[first:last].tolist() == sorted(follow)
    for path in paths:
        same = [item for item, other in enumerate(paths) if other == path]
        assert trie.items(path) == same
        assert trie.items([*path, 3, 3]) == same  # padding behind the end is not looked at
        assert trie.items(path[:-1]) == []


@pytest.mark.parametrize("space", ["trie", "vocab"])
def test_scores_are_those_of_the_space(trie: TokenTrie, space: str) -> None:
    """For a batch with prompts and padding, and for one request: beginnings, ended answers and strangers."""
    answers = prefixes(PATHS)
    scores_RV = 3 * torch.randn(len(answers), VOCAB, generator=torch.Generator().manual_seed(1))
    for answer, scores_V in zip(answers, scores_RV, strict=True):
        want_V = expected(PATHS, answer, scores_V, space)
        one_V = TrieLogitsProcessor(trie, score_space=space)(answer, scores_V)
        torch.testing.assert_close(one_V, want_V, atol=1e-6, rtol=0)
        prompted = torch.tensor([[1, 1, 6, *answer]] * 3)
        several_RV = TrieLogitsProcessor(trie, prompt_lengths=3, score_space=space)(prompted, scores_V.repeat(3, 1))
        torch.testing.assert_close(several_RV, want_V.repeat(3, 1), atol=1e-6, rtol=0)


def test_every_prompt_may_have_its_own_length(trie: TokenTrie) -> None:
    """Two prompts with two beams each: answers begin at columns 1 and 3."""
    rows = torch.tensor([[9, 3, 9, 4], [9, 3, 2, 2], [9, 9, 9, 3], [9, 9, 9, 5]])
    scores_RV = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    found_RV = TrieLogitsProcessor(trie, prompt_lengths=[1, 3])(rows, scores_RV)
    for row, answer in enumerate(([3, 9, 4], [3, 2, 2], [3], [5])):
        torch.testing.assert_close(found_RV[row], expected(PATHS, answer, scores_RV[row], "trie"), atol=1e-6, rtol=0)


def test_log_probs_and_logits_give_the_same(trie: TokenTrie) -> None:
    scores_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    for space in ("trie", "vocab"):
        processor = TrieLogitsProcessor(trie, score_space=space)
        torch.testing.assert_close(processor([3], scores_V), processor([3], scores_V.log_softmax(0)), atol=1e-6, rtol=0)


def test_wrong_use_is_named(trie: TokenTrie, folder: Path) -> None:
    with pytest.raises(ValueError, match="a batch needs prompt_lengths"):
        TrieLogitsProcessor(trie)(torch.ones(2, 3, dtype=torch.long), torch.zeros(2, VOCAB))
    with pytest.raises(ValueError, match="names 2 prompts, which does not divide the 3 rows"):
        TrieLogitsProcessor(trie, prompt_lengths=[1, 1])(torch.ones(3, 2, dtype=torch.long), torch.zeros(3, VOCAB))
    with pytest.raises(ValueError, match="score_space='joint'"):
        TrieLogitsProcessor(trie, score_space="joint")
    save_file({"a": np.zeros(1)}, folder / "trie.safetensors")
    with pytest.raises(ValueError, match="has format None"):
        TrieLogitsProcessor.load(folder)


def test_the_file_needs_nothing_but_torch_safetensors_and_transformers() -> None:
    tree = ast.parse(Path(tawin_trie.__file__).read_text(encoding="utf-8"))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert modules - set(sys.stdlib_module_names) == {"torch", "safetensors", "transformers"}


def test_the_layout_is_the_documented_one(folder: Path) -> None:
    arrays = load_file(folder / "trie.safetensors")
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "offsets": "int64", "tokens": "int32", "item_offsets": "int64", "items": "int64",
    }  # fmt: skip
    # depth 1: 0 3 5; depth 2: 0>7 3>2 3>9 5>7; depth 3: 3,2>2 3,9>4 3,9>7; depth 4: 3,2,2>2 3,9,4>7; depth 5: 7
    assert arrays["tokens"].tolist() == [0, 3, 5, 7, 2, 9, 7, 2, 4, 7, 2, 7, 7]
    assert arrays["offsets"].tolist() == [0, 3, 4, 6, 7, 7, 8, 10, 10, 11, 12, 12, 13, 13, 13]
    assert arrays["items"].tolist() == [5, 3, 0, 4, 1, 2]
    assert trie_rows(catalog_of(PATHS)).keys() == arrays.keys()


def test_tables_for_other_systems(tmp_path: Path) -> None:
    """A catalog of codes: the table comes back as it was, and every JSON line says item, tokens and codes."""
    codes = [["<a_1>", "<b_2>"], ["<a_1>", "<b_0>"], ["<a_1>", "<b_2>"]]
    catalog = catalog_of([[9, 4, EOS], [9, 5, EOS], [9, 4, EOS]], kind="sid")
    write_catalog(tmp_path, catalog, codes)
    again, codes_again = read_catalog(tmp_path)
    assert (again.fingerprint, again.kind, codes_again) == (catalog.fingerprint, "sid", codes)
    assert pq.read_table(tmp_path / "catalog.parquet").to_pylist()[1] == {
        "item": 1, "external_id": "B01", "title": "title B01", "codes": ["<a_1>", "<b_0>"], "token_ids": [9, 5, EOS],
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "catalog.jsonl").read_text().splitlines()]
    assert lines[1] == {"item_id": "B01", "token_ids": [9, 5], "codes": ["<a_1>", "<b_0>"], "title": "title B01"}
    assert [line["item_id"] for line in lines] == ["B00", "B01", "B02"]
    (tmp_path / "catalog.parquet").write_text("nothing")
    with pytest.raises(CatalogError, match=r"catalog\.parquet cannot be read"):
        read_catalog(tmp_path)
