"""A run directory remembers its catalog: another one, another tokenizer or a damaged file is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tawin_nemo.catalog.items import Catalog
from tawin_nemo.catalog.trie import TokenTrie
from tawin_nemo.run.world import store_catalog
from tawin_nemo.types import TokenRows
from tawin_nemo.util.errors import CatalogError

TOKENIZER = SimpleNamespace(fingerprint="abc")


def catalog(*paths: list[int]) -> Catalog:
    rows = TokenRows.from_lists(list(paths))
    names = [str(item) for item in range(len(paths))]
    return Catalog(names, names, "title", rows, TokenTrie.from_paths(rows))


def test_the_same_catalog_is_welcome_again(tmp_path: Path) -> None:
    for _ in range(2):
        store_catalog(tmp_path / "catalog", catalog([1, 9], [2, 3, 9]), TOKENIZER)  # type: ignore[arg-type]
    assert TokenTrie.load(tmp_path / "catalog", tokenizer="abc").num_items == 2


def test_another_catalog_names_both_sizes_and_the_remedy(tmp_path: Path) -> None:
    store_catalog(tmp_path / "catalog", catalog([1, 9], [2, 3, 9]), TOKENIZER)  # type: ignore[arg-type]
    for other in (catalog([1, 9], [2, 4, 9]), catalog([1, 9], [2, 3, 9], [5, 9])):
        with pytest.raises(CatalogError, match=rf"\(2 items\).*\({len(other)} items\).*new run with name="):
            store_catalog(tmp_path / "catalog", other, TOKENIZER)  # type: ignore[arg-type]


def test_another_tokenizer_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    folder, same = tmp_path / "catalog", catalog([1, 9], [2, 3, 9])
    store_catalog(folder, same, TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(CatalogError, match="tokenizer 'abc', not 'xyz'"):
        store_catalog(folder, same, SimpleNamespace(fingerprint="xyz"))  # type: ignore[arg-type]
    (folder / "child_tokens.npy").write_bytes(b"damaged")
    with pytest.raises(CatalogError, match=r"child_tokens\.npy does not match its checksum"):
        store_catalog(folder, same, TOKENIZER)  # type: ignore[arg-type]
