"""Saving and mapping tries, and every way in which a folder can be unfit."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.catalog.trie_build import TrieArrays
from tawin_nemo.util.errors import CatalogError

EOS = 0
PATHS = [[3, 7, EOS], [3, 7, 4, EOS], [3, 7, EOS], [3, 9, EOS]]
NAMES = [field.name for field in fields(TrieArrays)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TokenTrie.from_paths(PATHS).save(tmp_path / "trie", tokenizer="abc")
    return tmp_path / "trie"


def test_saved_trie_is_mapped_back_unchanged(folder: Path) -> None:
    trie, loaded = TokenTrie.from_paths(PATHS), TokenTrie.load(folder, tokenizer="abc")
    for name in NAMES:
        array = getattr(loaded.arrays, name)
        assert isinstance(array, np.memmap)
        assert array.dtype == getattr(trie.arrays, name).dtype
        np.testing.assert_array_equal(array, getattr(trie.arrays, name))
    assert loaded.items(int(loaded.leaf_I[0])).tolist() == [0, 2]
    tokens_NT, lengths_N = loaded.paths_of(torch.from_numpy(loaded.leaf_I))
    assert [row[:length] for row, length in zip(tokens_NT.tolist(), lengths_N.tolist(), strict=True)] == PATHS
    assert [part.tolist() for part in loaded.edges_of(torch.tensor([0]))[:2]] == [[0, 0], [7, 9]]
    assert loaded.root == trie.root


def test_a_trie_of_one_path_has_empty_arrays_and_is_mapped_back(tmp_path: Path) -> None:
    TokenTrie.from_paths([[5, EOS]]).save(tmp_path / "trie")
    loaded = TokenTrie.load(tmp_path / "trie")
    assert (loaded.num_inner, loaded.num_items, loaded.max_depth) == (0, 1, 2)


def test_saving_again_replaces_the_folder_whole(folder: Path) -> None:
    TokenTrie.from_paths([[1, EOS], [2, EOS]]).save(folder, tokenizer="xyz")
    assert TokenTrie.load(folder, tokenizer="xyz").num_items == 2
    assert [path.name for path in folder.parent.iterdir()] == ["trie"]


@pytest.mark.parametrize("name", NAMES)
def test_an_altered_or_missing_array_is_named(folder: Path, name: str) -> None:
    file = folder / f"{name}.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CatalogError, match=rf"{name}\.npy does not match its checksum; remove .* and build"):
        TokenTrie.load(folder, tokenizer="abc")
    file.unlink()
    with pytest.raises(CatalogError, match=rf"{name}\.npy is missing; remove .* and build the trie again"):
        TokenTrie.load(folder, tokenizer="abc")


def test_another_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(CatalogError, match=r"manifest\.json.*tokenizer 'abc', not 'xyz'.*build it again"):
        TokenTrie.load(folder, tokenizer="xyz")
    with pytest.raises(CatalogError, match="tokenizer 'abc', not ''"):
        TokenTrie.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": "tawin_nemo.token_trie/1", "sha256": {}}'])
def test_other_manifests_are_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CatalogError, match=r"trie.*build .*again"):
        TokenTrie.load(folder, tokenizer="abc")


def test_a_manifest_without_checksums_is_refused(folder: Path) -> None:
    file = folder / "manifest.json"
    whole = json.loads(file.read_text())
    for checksums in (None, {}):
        file.write_text(json.dumps(whole | {"sha256": checksums}))
        with pytest.raises(CatalogError, match="build the trie again"):
            TokenTrie.load(folder, tokenizer="abc")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"absent holds no readable trie.*build it again"):
        TokenTrie.load(tmp_path / "absent")
