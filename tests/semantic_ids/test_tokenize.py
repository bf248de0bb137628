"""The verb tokenize: folder and manifest, reuse, imports, growth of a catalog, and what train makes of the index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tawin_nemo.catalog.semantic_ids import load_codes
from tawin_nemo.commands.tokenize import brand_and_category_words, tokenize
from tawin_nemo.config.load import load_recipe
from tawin_nemo.semantic_ids.growth import ExistingIndex
from tawin_nemo.util.errors import CatalogError, ConfigError, DataError
from tawin_nemo.util.files import sha256
from tests.semantic_ids.catalog import prepared, titles
from tests.train.runs import run

ITEMS = 90
SMALL = ["semantic_ids.codes=6", "semantic_ids.levels=3", "semantic_ids.text.dims=8", "seed=3",
         "semantic_ids.rqvae.widths=[12]", "semantic_ids.rqvae.latent=4", "semantic_ids.rqvae.epochs=3"]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("shop") / "data", titles(ITEMS))


def made(root: Path, run: Path, *overrides: str) -> dict[str, Any]:
    return tokenize(load_recipe(None, [*SMALL, f"run_dir={run}", *overrides]), root)


def index_of(result: dict[str, Any], names: Sequence[str] = ()) -> list[list[str]]:
    """Codes of the items ``names``; without them of the shop's."""
    return load_codes(Path(result["index"]), names or external_ids(ITEMS))


def external_ids(items: int) -> list[str]:
    """As ``tests.semantic_ids.catalog.prepared`` names items."""
    return [f"B{item:03d}" for item in range(items)]


@pytest.mark.parametrize("method", ["rqkmeans", "constrained", "rqkmeans_plus", "rqvae", "random"])
def test_every_method_makes_a_whole_folder_without_collisions(shop: Path, tmp_path: Path, method: str) -> None:
    result = made(shop, tmp_path, f"semantic_ids.method={method}")
    words = index_of(result)
    assert len({tuple(item) for item in words}) == ITEMS
    assert all(len(item) == 3 for item in words)
    assert result["report"]["distinct"] == ITEMS
    folder = Path(result["index"]).parent
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) >= {
        "index.json",
        "info.txt",
        "report.json",
        "codes.png",
        "codebooks.npy",
        "items.json",
    }
    assert all(sha256(folder / name) == expected for name, expected in manifest["files"].items())
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name or path.name.startswith(".")] == []


def test_equal_requests_are_equal_bytes_and_reused(shop: Path, tmp_path: Path) -> None:
    first, second = (Path(made(shop, tmp_path / name)["index"]).parent for name in "ab")
    manifests = [json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in (first, second)]
    assert manifests[0] == manifests[1]
    stamp = (first / "manifest.json").stat().st_mtime_ns
    made(shop, tmp_path / "a")
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    (first / "index.json").write_text("{}", encoding="utf-8")  # damaged: made again
    assert len(index_of(made(shop, tmp_path / "a"))) == ITEMS
    other = made(shop, tmp_path / "a", "seed=4")
    assert index_of(other) != index_of({"index": second / "index.json"})


def test_the_report_sees_kinds_and_shared_rows(shop: Path, tmp_path: Path) -> None:
    report = made(shop, tmp_path, "semantic_ids.collisions=keep", "semantic_ids.text.fields=title")["report"]
    assert report["purity"]["same_first_code"] > 2 * report["purity"]["any_two"]
    assert report["items_sharing"] > 0
    assert 0 <= report["shared_test_rows"] <= 1
    assert brand_and_category_words(shop)[1] == frozenset({"bolton", "nitrile", "glove"})


def test_dedup_and_the_lcrec_layout(shop: Path, tmp_path: Path) -> None:
    ours = index_of(made(shop, tmp_path / "a", "semantic_ids.collisions=dedup"))
    theirs = index_of(made(shop, tmp_path / "b", "semantic_ids.collisions=dedup", "semantic_ids.layout=lcrec"))
    assert {len(item) for item in ours} == {3, 4}
    assert theirs == [item if len(item) == 4 else [*item, "<d_0>"] for item in ours]
    assert not (tmp_path / "b" / "semantic_ids" / "info.txt").exists()


# -- import --------------------------------------------------------------------------------------------------------
def test_an_index_made_elsewhere_is_reported_exported_and_grows(shop: Path, tmp_path: Path) -> None:
    given = index_of(made(shop, tmp_path / "a", "semantic_ids.collisions=dedup"))
    path = tmp_path / "theirs.index.json"
    path.write_text(json.dumps(dict(zip(external_ids(ITEMS), given, strict=True))), encoding="utf-8")
    result = made(shop, tmp_path / "b", f"semantic_ids.given={path}")
    assert index_of(result) == given
    assert result["report"]["items_with_more_tokens"] == sum(len(words) == 4 for words in given)
    assert result["report"]["refit_error"] == pytest.approx(result["report"]["reconstruction_error"])
    more = prepared(tmp_path / "more", titles(ITEMS + 4))
    grown = index_of(
        made(more, tmp_path / "c", f"semantic_ids.grow_from={tmp_path / 'b' / 'semantic_ids'}"), external_ids(ITEMS + 4)
    )
    assert grown[:ITEMS] == given
    assert len({tuple(words) for words in grown}) == ITEMS + 4


def test_an_index_of_another_catalog_is_refused(shop: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs.index.json"
    path.write_text(json.dumps({name: ["<a_1>", "<b_1>"] for name in external_ids(ITEMS + 1)[1:]}), encoding="utf-8")
    with pytest.raises(CatalogError, match=rf"1 have no codes: 'B000'; 1 are not in the catalog: 'B0{ITEMS}'"):
        made(shop, tmp_path, f"semantic_ids.given={path}")
    with pytest.raises(ConfigError, match=r"semantic_ids\.given=absent\.json: no file"):
        made(shop, tmp_path, "semantic_ids.given=absent.json")


# -- growth --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["rqkmeans", "rqkmeans_plus", "random"])
def test_a_grown_catalog_keeps_its_codes_by_external_id(shop: Path, tmp_path: Path, method: str) -> None:
    """The newer catalog has another order, three items fewer and eight more."""
    before = made(shop, tmp_path / "old", f"semantic_ids.method={method}")
    old = index_of(before)
    names, ids = titles(ITEMS + 8), external_ids(ITEMS + 8)
    order = [i for i in np.random.default_rng(0).permutation(ITEMS + 8).tolist() if i not in (2, 5, 11)]
    newer = prepared(tmp_path / "newer", [names[i] for i in order], ids=[ids[i] for i in order])
    folder = Path(before["index"]).parent
    after = made(newer, tmp_path / "new", f"semantic_ids.grow_from={folder}", "semantic_ids.codes=99")
    new = index_of(after, [ids[i] for i in order])
    assert all(new[place] == old[item] for place, item in enumerate(order) if item < ITEMS)
    fresh = {tuple(new[place]) for place, item in enumerate(order) if item >= ITEMS}
    assert len(fresh) == 8
    assert not fresh & {tuple(words) for words in old}  # not even those of the three that left
    assert after["report"]["kept_items"] == ITEMS - 3
    again = made(newer, tmp_path / "new", f"semantic_ids.grow_from={folder}")
    assert again == after
    if method != "rqkmeans":
        return
    # and all return: what left waits for its codes, however many indexes lie between
    back = prepared(tmp_path / "back", names, ids=ids)
    last = made(back, tmp_path / "back_run", f"semantic_ids.grow_from={Path(after['index']).parent}")
    assert index_of(last, ids)[:ITEMS] == old
    assert last["report"]["kept_items"] == ITEMS + 8


def test_growth_refuses_another_encoder_and_damaged_folders(shop: Path, tmp_path: Path) -> None:
    folder = Path(made(shop, tmp_path / "a")["index"]).parent
    assert ExistingIndex.read(folder).seed == 3
    with pytest.raises(DataError, match="is not an index folder"):
        made(shop, tmp_path / "b", f"semantic_ids.grow_from={tmp_path}")
    with (folder / "codes.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"codes\.npy is damaged or was edited"):
        made(shop, tmp_path / "b", f"semantic_ids.grow_from={folder}")


# -- bad input -----------------------------------------------------------------------------------------------------
def test_equal_vectors_are_refused_on_demand(tmp_path: Path) -> None:
    names = [*titles(40), "pipe wrench", "pipe wrench"]
    root = prepared(tmp_path / "data", names)
    keys = ("semantic_ids.text.fields=title", "semantic_ids.codes=4")
    with pytest.raises(DataError, match=r"2 items have the vector of another item \(1 groups, e\.g\. items 40, 41\)"):
        made(root, tmp_path / "a", *keys, "semantic_ids.duplicates=refuse")
    assert made(root, tmp_path / "a", *keys)["report"]["distinct"] == 42


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["semantic_ids.codes=500"], r"90 items cannot fill semantic_ids\.codes=500"),
        (["semantic_ids.text.encoder=hf"], r"semantic_ids\.text\.encoder=hf needs semantic_ids\.text\.source"),
        (["semantic_ids.text.source=x"], r"is not read by semantic_ids\.text\.encoder=tfidf"),
        (["semantic_ids.given=a.json", "semantic_ids.grow_from=b"], "both say where codes come from"),
        (["semantic_ids.rqvae.widths=[8,0]"], "semantic_ids.rqvae.widths=0 is out of limits; it must be in 1..65536"),
        (["semantic_ids.method=kmeans"], r"semantic_ids\.method=kmeans is not one of"),
    ],
)
def test_mistakes_are_named(shop: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        made(shop, tmp_path, *overrides)


# -- on the command line -------------------------------------------------------------------------------------------
def test_train_takes_the_index(shop: Path, tmp_path: Path) -> None:
    keys = [*SMALL, f"data.root={shop}", f"run_dir={tmp_path}"]
    result = run(*keys, verb="tokenize")
    train = ["catalog.kind=sid", f"catalog.index={result['index']}", "model.backbone=nano", "--dry-run"]
    planned = run(*keys, *train)
    assert planned["stages"] == {"sft": 19, "sft_continued": 5, "rl": 5}
