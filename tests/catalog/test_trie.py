"""The trie against a plain dictionary of prefixes, and what it does with bad input and altered files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.errors import CatalogError
from tawin_nemo.types import TokenRows

EOS = 0
LARGEST_TOKEN = 2**31 - 1
bodies = st.lists(st.one_of(st.integers(1, 4), st.just(LARGEST_TOKEN)), max_size=6)
catalogues = st.lists(bodies, min_size=1, max_size=25).map(lambda rows: [[*row, EOS] for row in rows])


def prefixes(paths: list[list[int]]) -> dict[tuple[int, ...], set[int]]:
    """Admissible next tokens after every prefix of the catalogue: the obvious trie."""
    following: dict[tuple[int, ...], set[int]] = {}
    for path in paths:
        for place, token in enumerate(path):
            following.setdefault(tuple(path[:place]), set()).add(token)
        following.setdefault(tuple(path), set())
    return following


def node_of(trie: TokenTrie, prefix: tuple[int, ...]) -> int:
    node = trie.root
    for token in prefix:
        node = trie.step(node, token)
    return node


@settings(deadline=None, max_examples=60)
@given(catalogues)
def test_nodes_are_the_prefixes_and_leaves_hold_the_items(paths: list[list[int]]) -> None:
    trie, following = TokenTrie.from_paths(paths), prefixes(paths)
    nodes = {prefix: node_of(trie, prefix) for prefix in following}
    assert sorted(nodes.values()) == list(range(trie.num_nodes))
    for prefix, admissible in following.items():
        tokens, children = trie.children(nodes[prefix])
        assert tokens.tolist() == sorted(admissible)
        assert children.tolist() == [nodes[(*prefix, token)] for token in tokens.tolist()]
        assert trie.items(nodes[prefix]).tolist() == [i for i, path in enumerate(paths) if tuple(path) == prefix]
        assert trie.step(nodes[prefix], 99) == -1
    assert trie.leaf_I.tolist() == [nodes[tuple(path)] for path in paths]
    assert trie.num_leaves == len({tuple(path) for path in paths})
    assert trie.max_depth == max(map(len, paths))


@settings(deadline=None, max_examples=60)
@given(catalogues)
def test_tensors_agree_with_the_prefixes(paths: list[list[int]]) -> None:
    trie, following = TokenTrie.from_paths(paths), prefixes(paths)
    t = trie.tensors()
    for prefix, admissible in following.items():
        node = node_of(trie, prefix)
        below = {tuple(path) for path in paths if tuple(path[: len(prefix)]) == prefix}
        assert int(t.depth[node]) == len(prefix)
        assert bool(t.is_leaf[node]) == (not admissible)
        assert bool(t.is_settled[node]) == (len(below) == 1)
        assert int(t.first_item[node]) == min((i for i, path in enumerate(paths) if tuple(path) == prefix), default=-1)
        assert int(t.parent[node]) == (node_of(trie, prefix[:-1]) if prefix else -1)
    deepest = max((len(prefix) for prefix, admissible in following.items() if len(admissible) > 1), default=0)
    assert trie.decision_depth == deepest


@settings(deadline=None, max_examples=60)
@given(catalogues, st.randoms(use_true_random=False))
def test_children_of_lists_the_children_of_each_node(paths: list[list[int]], random: object) -> None:
    trie = TokenTrie.from_paths(paths)
    nodes = [random.randrange(-1, trie.num_nodes) for _ in range(12)]  # type: ignore[attr-defined]
    position_E, token_E, child_E = trie.children_of(torch.tensor(nodes))
    expected = [
        (position, token, child)
        for position, node in enumerate(nodes)
        if node >= 0
        for token, child in zip(*(array.tolist() for array in trie.children(node)), strict=True)
    ]
    assert list(zip(position_E.tolist(), token_E.tolist(), child_E.tolist(), strict=True)) == expected


@settings(deadline=None, max_examples=60)
@given(catalogues, st.lists(st.lists(st.integers(-1, 5), max_size=7), min_size=1, max_size=8))
def test_walk_names_the_node_before_each_token(paths: list[list[int]], strangers: list[list[int]]) -> None:
    trie, rows = TokenTrie.from_paths(paths), TokenRows.from_lists([*paths, *strangers])
    nodes_NT = trie.walk(*rows.padded())
    for row in range(len(rows)):
        node, expected = trie.root, []
        for token in rows[row].tolist():
            expected.append(node)
            node = trie.step(node, token) if node >= 0 else -1
        assert nodes_NT[row, : len(expected)].tolist() == expected
        assert (nodes_NT[row, len(expected) :] == -1).all()


@settings(deadline=None, max_examples=60)
@given(catalogues)
def test_paths_of_leaves_are_the_items_paths(paths: list[list[int]]) -> None:
    trie = TokenTrie.from_paths(paths)
    tokens_NT, lengths_N = trie.paths_of(torch.tensor([*trie.leaf_I.tolist(), -1]))
    assert lengths_N.tolist() == [*map(len, paths), 0]
    for tokens, length, path in zip(tokens_NT.tolist(), lengths_N.tolist(), [*paths, []], strict=True):
        assert tokens[:length] == path
        assert not any(tokens[length:])


def test_order_of_tokens_is_numeric_not_bytewise() -> None:
    trie = TokenTrie.from_paths([[256, EOS], [1, EOS], [65_536, EOS], [255, EOS]])
    assert trie.children(trie.root)[0].tolist() == [1, 255, 256, 65_536]


def test_bad_catalogues_are_refused_by_name() -> None:
    with pytest.raises(CatalogError, match="no items"):
        TokenTrie.from_paths([])
    with pytest.raises(CatalogError, match="item 1 has an empty token path"):
        TokenTrie.from_paths([[1], []])
    with pytest.raises(CatalogError, match="item 1 has token -5"):
        TokenTrie.from_paths([[1, 2], [3, -5]])
    with pytest.raises(CatalogError, match=str(2**31)):
        TokenTrie.from_paths([[2**31]])
    with pytest.raises(CatalogError, match=r"item 2 \('Saw'\) is the beginning of that of item 0 \('Saw blade'\).*EOS"):
        TokenTrie.from_paths([[7, 8, 9], [5], [7, 8]], names=["Saw blade", "Nail", "Saw"])


def test_saved_trie_is_mapped_back_unchanged(tmp_path: Path) -> None:
    trie = TokenTrie.from_paths([[3, EOS], [3, 4, EOS], [3, EOS]])
    trie.save(tmp_path / "trie")
    loaded = TokenTrie.load(tmp_path / "trie")
    for name in ("child_offsets", "child_tokens", "item_offsets", "item_ids"):
        array = getattr(loaded, name)
        assert isinstance(array, np.memmap)
        np.testing.assert_array_equal(array, getattr(trie, name))
    assert loaded.items(loaded.step(loaded.step(loaded.root, 3), EOS)).tolist() == [0, 2]
    assert loaded.children_of(torch.tensor([0]))[1].tolist() == [3]


def test_altered_or_missing_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "trie"
    with pytest.raises(CatalogError, match="no readable trie"):
        TokenTrie.load(folder)
    TokenTrie.from_paths([[3, EOS], [4, EOS]]).save(folder)
    tokens = folder / "child_tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CatalogError, match=r"child_tokens\.npy.*checksum"):
        TokenTrie.load(folder)
    tokens.unlink()
    with pytest.raises(CatalogError, match=r"child_tokens\.npy is missing"):
        TokenTrie.load(folder)
    (folder / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(CatalogError, match="format"):
        TokenTrie.load(folder)
