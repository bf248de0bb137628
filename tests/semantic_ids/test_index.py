"""The whole tokenizer in memory: every method, growth, index files, bijection through the trie, the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawin_nemo.catalog.semantic_ids import load_codes
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.config.schema import RqVaeConfig, SemanticIdsConfig
from tawin_nemo.semantic_ids.codebooks import Codebooks
from tawin_nemo.semantic_ids.coder import ItemCoder, fit, random_codes, resolve_collisions
from tawin_nemo.semantic_ids.collisions import NO_TOKEN, shared_rows, with_dedup_token
from tawin_nemo.semantic_ids.growth import encode_new_items
from tawin_nemo.semantic_ids.index_files import code_tokens, read_index, write_index, write_info
from tawin_nemo.semantic_ids.report import level_use, measure, plot_index, purity, relative_error, word_sets
from tawin_nemo.util.errors import CatalogError, ConfigError, DataError
from tests.semantic_ids.vectors import blobs

METHODS = ("rqkmeans", "constrained", "rqkmeans_plus", "rqvae", "random")
SMALL = SemanticIdsConfig(
    levels=3, codes=8, kmeans_iterations=10, rqvae=RqVaeConfig(widths=[12], latent=4, epochs=6, batch_size=64)
)


def trie_of(codes_IL: np.ndarray) -> TokenTrie:
    """Each level its own numbers, an end behind every path."""
    return TokenTrie.from_paths(
        [[1 + code + 1000 * level for level, code in enumerate(row) if code != NO_TOKEN] + [0] for row in codes_IL]
    )


@pytest.fixture(scope="module", params=METHODS)
def fitted(request: pytest.FixtureRequest) -> tuple[ItemCoder, np.ndarray, np.ndarray]:
    x_ID = blobs(150, seed=2)
    x_ID[:5] = x_ID[0]  # duplicates collide under every method that looks at the vectors
    return *fit(x_ID, replace(SMALL, method=request.param), seed=4), x_ID


# -- methods -------------------------------------------------------------------------------------------------------
def test_codes_trie_items_is_a_bijection(fitted) -> None:
    coder, raw_IL, x_ID = fitted
    for how in ("assign", "dedup"):
        codes_IL = resolve_collisions(raw_IL, coder, x_ID, how)
        trie = trie_of(codes_IL)
        assert trie.num_leaves == len(x_ID)
        assert [trie.items(int(leaf)).tolist() for leaf in trie.leaf_I] == [[item] for item in range(len(x_ID))]
    trie = trie_of(resolve_collisions(raw_IL, coder, x_ID, "keep"))
    declared = shared_rows(raw_IL)
    assert [len(trie.items(int(leaf))) > 1 for leaf in trie.leaf_I] == declared.tolist()
    assert declared.any() == (coder.method not in ("random",))


def test_save_and_load_give_the_same_codes_and_vectors(fitted, tmp_path: Path) -> None:
    coder, _, x_ID = fitted
    coder.save(tmp_path)
    loaded = ItemCoder.load(tmp_path)
    assert loaded.method == coder.method
    codes_IL = coder.encode(x_ID)
    np.testing.assert_array_equal(loaded.encode(x_ID), codes_IL)
    np.testing.assert_array_equal(loaded.decode(codes_IL), coder.decode(codes_IL))
    (tmp_path / "codebooks.npy").unlink()
    with pytest.raises(DataError, match="holds no tokenizer that can be read"):
        ItemCoder.load(tmp_path)


def test_equal_seeds_give_equal_codes(fitted) -> None:
    coder, raw_IL, x_ID = fitted
    np.testing.assert_array_equal(fit(x_ID, replace(SMALL, method=coder.method), seed=4)[1], raw_IL)
    assert not np.array_equal(fit(x_ID, replace(SMALL, method=coder.method), seed=5)[1], raw_IL)


def test_vectors_of_another_width_are_refused(fitted) -> None:
    with pytest.raises(DataError, match="vectors of 3 dimensions, but the codebooks were made for 6"):
        fitted[0].encode(np.ones((2, 3), dtype=np.float32))


def test_random_codes_differ_and_run_out() -> None:
    taken = random_codes(20, levels=2, codes=6, seed=0)
    others = random_codes(16, levels=2, codes=6, seed=0, taken=taken)
    assert len({tuple(row) for row in [*taken.tolist(), *others.tolist()]}) == 36
    with pytest.raises(
        ConfigError, match=r"37 items, but semantic_ids\.codes=6 \*\* semantic_ids\.levels=2 gives only 36"
    ):
        random_codes(17, levels=2, codes=6, seed=0, taken=taken)


# -- growth --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["assign", "dedup"])
def test_new_items_get_codes_of_their_own(fitted, how: str) -> None:
    coder, raw_IL, x_ID = fitted
    old_IL = resolve_collisions(raw_IL, coder, x_ID, how)
    kept_IL = old_IL.copy()
    fresh_ND = np.concatenate([x_ID[:6], blobs(40, seed=3)])  # six of them equal old items
    new_NL = encode_new_items(old_IL, coder, fresh_ND, how)
    both_IL = np.concatenate([old_IL, new_NL])
    np.testing.assert_array_equal(old_IL, kept_IL)
    assert not shared_rows(both_IL).any()
    assert trie_of(both_IL).num_leaves == len(both_IL)
    np.testing.assert_array_equal(new_NL, encode_new_items(old_IL, coder, fresh_ND, how))


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_growth_fills_the_space_to_the_last_code(seed: int) -> None:
    """Two levels of four codes: 16 IDs. Whatever is taken, the rest is given out once each, then comes an error."""
    rng = np.random.default_rng(seed)
    coder = ItemCoder("rqkmeans", Codebooks(rng.normal(size=(2, 4, 3)).astype(np.float32)))
    taken = random_codes(int(rng.integers(1, 12)), levels=2, codes=4, seed=seed)
    x_ND = rng.normal(size=(16 - len(taken), 3)).astype(np.float32)
    new_NL = encode_new_items(taken, coder, x_ND, "assign")
    assert len({tuple(row) for row in [*taken.tolist(), *new_NL.tolist()]}) == 16
    with pytest.raises(DataError, match=r"item 0: all 16 IDs that begin with \[\] are taken"):
        encode_new_items(np.concatenate([taken, new_NL]), coder, x_ND[:1], "assign")


def test_growth_takes_the_nearest_free_last_code() -> None:
    books = Codebooks(np.array([[[0.0], [100.0]], [[0.0], [1.0]]], dtype=np.float32))
    coder = ItemCoder("rqkmeans", books)
    old_IL = np.array([[0, 0]], dtype=np.int32)
    assert encode_new_items(old_IL, coder, np.array([[0.1]]), "assign").tolist() == [[0, 1]]
    assert sorted(encode_new_items(old_IL, coder, np.array([[0.1], [0.2]]), "assign").tolist()) == [[0, 1], [1, 0]]
    assert encode_new_items(old_IL, coder, np.array([[0.1]]), "keep").tolist() == [[0, 0]]
    assert encode_new_items(old_IL, coder, np.empty((0, 1)), "assign").shape == (0, 2)


def test_growth_of_dedup_tokens_counts_on() -> None:
    books = Codebooks(np.array([[[0.0], [10.0]], [[0.0], [1.0]]], dtype=np.float32))
    coder = ItemCoder("rqkmeans", books)
    old_IL = with_dedup_token(np.array([[0, 0], [0, 0], [1, 0]], dtype=np.int32))
    new_NL = encode_new_items(old_IL, coder, np.array([[0.0], [10.0], [11.0], [10.0]]), "dedup")
    assert new_NL.tolist() == [[0, 0, 2], [1, 0, 0], [1, 1, NO_TOKEN], [1, 0, 1]]


# -- index files ---------------------------------------------------------------------------------------------------
CODES = with_dedup_token(np.array([[3, 1, 4], [2, 7, 1], [3, 1, 4]], dtype=np.int32))


def test_the_layouts(tmp_path: Path) -> None:
    assert code_tokens(CODES)[:2] == [["<a_3>", "<b_1>", "<c_4>", "<d_0>"], ["<a_2>", "<b_7>", "<c_1>"]]
    assert code_tokens(CODES, "lcrec")[1] == ["<a_2>", "<b_7>", "<c_1>", "<d_0>"]
    write_index(tmp_path / "index.json", CODES)
    assert load_codes(tmp_path / "index.json", ["0", "1", "2"]) == code_tokens(CODES)
    found = read_index(tmp_path / "index.json", ["0", "1", "2"])
    np.testing.assert_array_equal(found.codes_IL, CODES)
    assert found.levels == 3
    write_index(tmp_path / "lcrec.json", CODES, "lcrec")
    np.testing.assert_array_equal(
        read_index(tmp_path / "lcrec.json", ["0", "1", "2"]).codes_IL, np.where(CODES < 0, 0, CODES)
    )
    write_info(tmp_path / "info.txt", CODES, ["Hex\tbolt", "Nut", "Hex bolt"])
    lines = (tmp_path / "info.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["<a_3><b_1><c_4><d_0>\tHex bolt\t0", "<a_2><b_7><c_1>\tNut\t1"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["<a_1>", "<b_2>"], r"1 items have another number of tokens than 3 or 4: 1 .*\['<a_1>', '<b_2>'\]"),
        (["<a_1>", "<b_2>", "<c_3>", "<d_0>", "<e_1>"], "1 items have another number of tokens than 3 or 4: 1"),
        (["<a_1>", "<c_2>", "<c_3>"], r"1 items have tokens that are not <a_N>, <b_N>, \.\.\. in this order: 1"),
        (["<a_1>", "<b_2>", "bolt"], "1 items have tokens that are not"),
        (["<a_1>", "<b_8>", "<c_3>"], "1 items have codes that are not below 8: 1"),
        (None, "1 have no codes: '1'"),
    ],
)
def test_an_index_that_does_not_fit_names_its_items(tmp_path: Path, second: list[str] | None, message: str) -> None:
    index = {"0": ["<a_1>", "<b_2>", "<c_3>", "<d_9>"], "1": second, "2": ["<a_0>", "<b_0>", "<c_0>"]}
    (tmp_path / "i.json").write_text(
        json.dumps({key: words for key, words in index.items() if words}), encoding="utf-8"
    )
    with pytest.raises(CatalogError, match=message):
        read_index(tmp_path / "i.json", ["0", "1", "2"], levels=3, codes=8)


# -- report --------------------------------------------------------------------------------------------------------
def test_the_report_counts_what_a_person_would_count() -> None:
    codes_IL = np.array([[0, 0, 0, -1], [0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, -1], [2, 0, 0, -1], [2, 0, 0, -1]])
    x_ID = np.array([[0.0], [1.0], [1.0], [2.0], [9.0], [9.0]])
    report = measure(codes_IL, 3, x_ID, test_target_N=np.array([0, 4, 5, 4]), read_ID=x_ID + 1)
    assert (report.items, report.distinct, report.distinct_without_dedup, report.items_sharing) == (6, 5, 4, 2)
    assert report.collision_rate == pytest.approx(1 / 6)
    assert report.shared_test_rows == 0.75
    assert report.prefixes == [2, 3, 4, 5]
    assert report.largest_family == 3
    assert (report.items_with_more_tokens, report.tokens_mean) == (2, pytest.approx(20 / 6))
    assert report.levels[0].used == 2
    assert report.levels[0].entropy_bits == pytest.approx(-(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3)))
    assert report.levels[0].largest_share == pytest.approx(2 / 3)
    # left over by the means of each level: -.7 of item 0, .1 of item 3, .3 of items 4 and 5
    assert report.refit_error == pytest.approx((0.49 + 0.01 + 2 * 0.09) / ((x_ID - x_ID.mean()) ** 2).sum())
    assert report.reconstruction_error == pytest.approx(6 / ((x_ID - x_ID.mean()) ** 2).sum())
    assert report.purity is None
    assert level_use(np.array([5, 5, 5])).entropy_bits == 0
    assert relative_error(x_ID, np.broadcast_to(x_ID.mean(), x_ID.shape)) == pytest.approx(1)


def test_purity_sees_codes_that_follow_the_words() -> None:
    words = word_sets([f"Brand{item % 5} & Co" if item % 7 else "!" for item in range(200)])
    assert words[1] == frozenset({"brand1", "co"})
    assert words[0] == frozenset()
    words = [own - {"co"} for own in words]
    good = purity(np.arange(200) % 5, words, seed=0)
    bad = purity(np.arange(200) // 50, words, seed=0)
    assert good is not None
    assert bad is not None
    assert good.same_first_code == 1
    assert good.any_two == pytest.approx(0.2, abs=0.02)
    assert bad.same_first_code == pytest.approx(0.2, abs=0.03)
    assert good.items_with_words == sum(1 for item in range(200) if item % 7)
    assert purity(np.arange(200), words, seed=0) is None


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    plot_index(tmp_path / "codes.png", blobs(30), np.zeros((30, 2), dtype=np.int32), 2, title="one code")
    assert (tmp_path / "codes.png").read_bytes().startswith(b"\x89PNG")
