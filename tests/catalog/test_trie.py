"""The radix trie against a nested dictionary, and what it does with bad input."""

from __future__ import annotations

from dataclasses import dataclass, fields
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.catalog import trie_build
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.catalog.trie_build import TrieArrays
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError

EOS = 0
LARGEST_TOKEN = 2**31 - 1
Prefix = tuple[int, ...]

edge_tokens = st.sampled_from([255, 256, 65_535, 65_536, LARGEST_TOKEN])
short = st.lists(st.one_of(st.integers(1, 4), edge_tokens), max_size=6)
long = st.builds(lambda head, times, tail: head * times + tail, short, st.integers(1, 8), short)  # several sort words


@st.composite
def catalogs(draw: st.DrawFn) -> list[list[int]]:
    """Paths that end in EOS, many alike or alike at the beginning, some all beginning alike."""
    root = draw(st.one_of(st.just([]), short))
    bodies = draw(st.lists(st.one_of(short, long), min_size=1, max_size=25))
    again = draw(st.lists(st.sampled_from(bodies), max_size=5))
    forks = [[*body[: draw(st.integers(0, len(body)))], *draw(short)] for body in draw(st.permutations(bodies))[:8]]
    return [[*root, *body, EOS] for body in [*bodies, *again, *forks]]


@dataclass(frozen=True)
class DictTrie:
    """The obvious trie: a dictionary per node, and the nodes a radix trie keeps, found by looking."""

    root: dict
    paths: list[Prefix]

    @classmethod
    def of(cls, paths: list[list[int]]) -> DictTrie:
        root: dict = {}
        for path in paths:
            node = root
            for token in path:
                node = node.setdefault(token, {})
        return cls(root, [tuple(path) for path in paths])

    def at(self, prefix: Prefix) -> dict | None:
        node: dict | None = self.root
        for token in prefix:
            node = node.get(token) if node is not None else None
        return node

    def prefixes(self) -> list[Prefix]:
        return sorted({path[:end] for path in self.paths for end in range(len(path) + 1)})

    def inner(self) -> list[Prefix]:
        """Prefixes with a choice, as radix nodes are numbered: by length, then sorted."""
        return sorted(
            (prefix for prefix in self.prefixes() if len(self.at(prefix) or {}) > 1), key=lambda p: (len(p), p)
        )

    def below(self, prefix: Prefix, token: int) -> Prefix:
        """The first prefix with a choice, or whole path, behind the edge that begins with ``token``."""
        node = (self.at(prefix) or {})[token]
        prefix = (*prefix, token)
        while len(node) == 1:
            [(token, node)] = node.items()
            prefix = (*prefix, token)
        return prefix

    def numbered(self) -> dict[Prefix, int]:
        """Expected radix id of every prefix that has one."""
        inner = self.inner()
        places = sorted(self.paths)
        return {prefix: node for node, prefix in enumerate(inner)} | {
            path: len(inner) + places.index(path) for path in self.paths
        }


def tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def assert_equals_dictionaries(trie: TokenTrie, paths: list[list[int]]) -> None:
    """Everything the trie says about nodes, edges, paths and items."""
    oracle = DictTrie.of(paths)
    node_of, inner = oracle.numbered(), oracle.inner()
    assert (trie.num_items, trie.num_inner) == (len(paths), len(inner))
    assert trie.num_leaves == len(set(oracle.paths))
    assert trie.num_nodes == trie.num_inner + trie.num_items
    assert trie.max_depth == max(map(len, paths))
    assert trie.decision_depth == max(map(len, inner), default=0)
    assert trie.max_token == max(map(max, paths))
    assert trie.leaf_I.tolist() == [node_of[path] for path in oracle.paths]
    assert trie.sharing_I.tolist() == [oracle.paths.count(path) for path in oracle.paths]

    prefixes, nodes = list(node_of), tensor(list(node_of.values()))
    assert trie.depth_of(nodes).tolist() == [len(prefix) for prefix in prefixes]
    assert trie.is_leaf(nodes).tolist() == [prefix in set(oracle.paths) for prefix in prefixes]
    for prefix, node in node_of.items():
        expected = [item for item, path in enumerate(oracle.paths) if path == prefix]
        assert trie.items(node).tolist() == expected
        if expected:
            assert trie.first_item(tensor([node])).tolist() == expected[:1]
    tokens_NT, lengths_N = trie.paths_of(tensor([*nodes.tolist(), -1]))
    assert lengths_N.tolist() == [*map(len, prefixes), 0]
    for tokens, prefix in zip(tokens_NT.tolist(), [*prefixes, ()], strict=True):
        assert tuple(tokens[: len(prefix)]) == prefix
        assert not any(tokens[len(prefix) :])

    shuffled = [*node_of.values(), -1, *node_of.values()]
    Random(0).shuffle(shuffled)
    prefix_of = {node: prefix for prefix, node in node_of.items()}
    edges = [
        (position, token, node_of[oracle.below(prefix_of[node], token)])
        for position, node in enumerate(shuffled)
        if node >= 0
        for token in sorted(oracle.at(prefix_of[node]) or {})
    ]
    found = trie.edges_of(tensor(shuffled))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == edges
    strangers = [[node, token] for node in [*shuffled, -1] for token in (-1, 0, 3, 99, 256, LARGEST_TOKEN)]
    known = {(shuffled[position], token): child for position, token, child in edges}
    asked = tensor([*([shuffled[position], token] for position, token, _ in edges), *strangers])  # type: ignore[list-item]
    assert trie.follow(asked[:, 0], asked[:, 1]).tolist() == [known.get(tuple(pair), -1) for pair in asked.tolist()]


@settings(max_examples=150)
@given(catalogs())
def test_nodes_edges_paths_and_items(paths: list[list[int]]) -> None:
    assert_equals_dictionaries(TokenTrie.from_paths(paths), paths)


@settings(max_examples=60)
@given(catalogs(), st.randoms(use_true_random=False))
def test_labels_are_pieces_of_the_paths(paths: list[list[int]], random: Random) -> None:
    trie = TokenTrie.from_paths(paths)
    nodes, starts, stops, expected = [-1], [0], [0], []
    for prefix, node in DictTrie.of(paths).numbered().items():
        start = random.randint(0, len(prefix))
        stop = random.randint(start, len(prefix))
        nodes, starts, stops = [*nodes, node], [*starts, start], [*stops, stop]
        expected += prefix[start:stop]
    assert trie.labels(tensor(nodes), tensor(starts), tensor(stops)).tolist() == expected


@settings(max_examples=60)
@given(catalogs())
def test_token_by_token_every_prefix_has_its_own_position(paths: list[list[int]]) -> None:
    trie, oracle = TokenTrie.from_paths(paths), DictTrie.of(paths)
    position_of: dict[Prefix, int] = {(): trie.root}
    for prefix in oracle.prefixes():  # sorted, so a prefix comes after what it continues
        position = position_of[prefix]
        following = oracle.at(prefix) or {}
        tokens, positions = trie.children(position)
        assert tokens.tolist() == sorted(following)
        position_of |= {
            (*prefix, token): after for token, after in zip(tokens.tolist(), positions.tolist(), strict=True)
        }
        for token in (-1, 0, 1, 99, LARGEST_TOKEN):
            assert (trie.step(position, token) >= 0) == (token in following)
        for token in following:
            assert trie.step(position, token) == position_of[(*prefix, token)]
        assert trie.items(position).tolist() == [item for item, path in enumerate(oracle.paths) if path == prefix]
    assert len(set(position_of.values())) == len(position_of)
    for prefix, node in oracle.numbered().items():
        assert position_of[prefix] == node
    assert trie.step(-1, 1) == -1


@settings(max_examples=60)
@given(catalogs(), st.sampled_from([2, 8]), st.sampled_from([np.int16, np.int32, np.int64, np.uint64]))
def test_wide_indices_narrow_words_and_other_integer_types_change_nothing(
    paths: list[list[int]], limit: int, dtype: type[np.integer]
) -> None:
    if np.iinfo(dtype).max < LARGEST_TOKEN:
        paths = [[token % 2**15 for token in path[:-1]] + [2**15 - 1] for path in paths]
        paths = [path for path in paths if 2**15 - 1 not in path[:-1]] or [[1]]
    rows = TokenRows.from_lists(paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_build, "INT32_LIMIT", limit)
        patch.setattr(trie_build, "WORD_BITS", 40)  # groups of rows are cut in two until one column fits
        wide = TokenTrie.from_paths(TokenRows(rows.flat.astype(dtype), rows.offsets))
    assert len(paths) <= limit or wide.arrays.node_item.dtype == np.int64
    plain = TokenTrie.from_paths(rows)
    for field in fields(TrieArrays):
        np.testing.assert_array_equal(getattr(wide.arrays, field.name), getattr(plain.arrays, field.name))
    assert_equals_dictionaries(wide, paths)


@pytest.mark.parametrize("tokens", [20, 300])
def test_long_paths_that_part_late(tokens: int) -> None:
    random = Random(tokens)
    body = [random.randint(1, 2**31 - 1) for _ in range(tokens)]
    paths = [[*body[:cut], random.randint(1, 9), EOS] for cut in range(0, tokens, 3)] + [[*body, EOS]] * 3
    assert_equals_dictionaries(TokenTrie.from_paths(paths), paths)


def test_many_random_codes() -> None:
    codes = np.random.default_rng(0).integers(0, 6, (3000, 4))
    trie = TokenTrie.from_paths(codes.tolist())
    tokens_NT, lengths_N = trie.paths_of(torch.from_numpy(trie.leaf_I))
    np.testing.assert_array_equal(tokens_NT, codes)
    assert set(lengths_N.tolist()) == {4}
    assert trie.num_leaves == len(np.unique(codes, axis=0))
    assert trie.num_inner == 1 + 6 + 36 + 216  # every prefix has a choice at this density
    for leaf in set(trie.leaf_I.tolist()):
        assert trie.items(leaf).tolist() == np.flatnonzero(trie.leaf_I == leaf).tolist()


def test_one_path_has_no_choice_and_its_leaf_is_the_root_node() -> None:
    trie = TokenTrie.from_paths([[7, 8, EOS]] * 2)
    assert (trie.num_inner, trie.num_leaves, trie.decision_depth) == (0, 1, 0)
    assert trie.leaf_I.tolist() == [0, 0]
    assert trie.is_leaf(tensor([0, -1])).tolist() == [True, False]
    assert [part.tolist() for part in trie.edges_of(tensor([0, -1]))] == [[], [], []]
    assert trie.follow(tensor([0, -1]), tensor([7, 7])).tolist() == [-1, -1]
    position = trie.root
    for token in (7, 8, EOS):
        assert trie.children(position)[0].tolist() == [token]
        position = trie.step(position, token)
    assert position == 0
    assert trie.items(position).tolist() == [0, 1]


def test_no_nodes_asked() -> None:
    trie, nothing = TokenTrie.from_paths([[1, EOS], [2, EOS]]), tensor([])
    assert [part.tolist() for part in trie.edges_of(nothing)] == [[], [], []]
    assert trie.follow(nothing, nothing).tolist() == []
    assert trie.labels(nothing, nothing, nothing).tolist() == []
    assert trie.paths_of(nothing)[0].shape == (0, 0)


def test_order_of_tokens_is_numeric_not_bytewise() -> None:
    trie = TokenTrie.from_paths([[256, EOS], [1, EOS], [65_536, EOS], [255, EOS]])
    assert trie.children(trie.root)[0].tolist() == [1, 255, 256, 65_536]


def test_rows_of_int32_are_kept_without_a_copy_and_the_index_is_narrow() -> None:
    flat = np.arange(1, 4001, dtype=np.int32)
    trie = TokenTrie.from_paths(TokenRows(flat, np.arange(0, 4001, 4)))
    assert np.shares_memory(trie.arrays.pool_tokens, flat)
    assert trie.pool_bytes == 4 * 4000 + 4 * 1001
    # 1000 edges of 4 + 4 bytes; offsets of one node; depth 1 and item 4 bytes of 1001 nodes
    assert trie.index_bytes == 8 * 1000 + 4 * 2 + 5 * 1001
    assert trie.tensors().child_tokens.data_ptr() == trie.arrays.child_tokens.ctypes.data
    assert trie.tensors("cpu") is trie.tensors(torch.device("cpu"))


def test_bad_catalogs_are_refused_by_name() -> None:
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


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=8))
def test_paths_that_begin_others_are_counted(paths: list[list[int]]) -> None:
    distinct = {tuple(path) for path in paths}
    cut = {a for a in distinct for b in distinct if len(a) < len(b) and b[: len(a)] == a}
    if cut:
        with pytest.raises(CatalogError, match=rf"\({len(cut)} such paths in all\)"):
            TokenTrie.from_paths(paths)
    else:
        assert_equals_dictionaries(TokenTrie.from_paths(paths), paths)
