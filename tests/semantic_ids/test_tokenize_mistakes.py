"""What a user can give `tawin-nemo tokenize` and `train` by mistake: each ends with exit code 2 and names the items."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tawin_nemo.cli import main
from tests.semantic_ids.catalog import titles

ITEMS = 40
HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
SMALL = ["data.dataset=inter", "semantic_ids.codes=4", "semantic_ids.text.dims=8"]
Texts = dict[str, dict[str, object]]
Index = dict[str, list[str]]


def shop(folder: Path, change: Callable[[Texts], object] = lambda texts: None) -> Path:
    """A shop in MiniOneRec's layout, its item file changed."""
    texts: Texts = {str(item): {"title": title, "description": ""} for item, title in enumerate(titles(ITEMS))}
    change(texts)
    folder.mkdir()
    (folder / "Shop.item.json").write_text(json.dumps(texts), encoding="utf-8")
    for split in ("train", "valid", "test"):
        lines = [f"{user}\t{user % 7} {user % 11}\t{user % 13}\n" for user in range(20)]
        (folder / f"Shop.{split}.inter").write_text(HEADER + "".join(lines), encoding="utf-8")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The last line on stderr of a command that must end with exit code 2."""
    assert main(list(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.strip().splitlines()[-1]


# -- texts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda texts: texts["3"].update(title=""), "1 items have no title, e.g. [3]"),
        (lambda texts: texts["4"].update(title=None), "1 items have no title, e.g. [4]"),
        (lambda texts: texts["5"].pop("title"), "1 items have no title, e.g. [5]"),
        (lambda texts: texts["6"].update(title="!!! --"), "1 items have no text in title and description: items 6"),
        (lambda texts: texts.pop("7"), "keys 0..38 for its 39 items; '7' missing, '39' not among them"),
    ],
    ids=["empty", "null", "absent", "no words", "no item"],
)
def test_items_without_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Texts], object], named: str
) -> None:
    root = shop(tmp_path / "data", change)
    assert named in refused(capsys, "tokenize", *SMALL, f"data.root={root}", f"run_dir={tmp_path / 'run'}")


def test_equal_texts_are_said_aloud_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def alike(texts: Texts) -> None:
        texts["8"] = texts["9"] = texts["7"]

    root = shop(tmp_path / "data", alike)
    words = ["tokenize", *SMALL, "semantic_ids.codes=8", f"data.root={root}", f"run_dir={tmp_path / 'run'}"]
    named = "3 items have the vector of another item (1 groups, e.g. items 7, 8, 9)"
    assert named in refused(capsys, *words, "semantic_ids.duplicates=refuse")
    said: list[str] = []
    monkeypatch.setattr("tawin_nemo.commands.tokenize.say", said.append)
    assert main(words) == 0
    assert any(named in line for line in said)
    assert json.loads(capsys.readouterr().out)["report"]["distinct"] == ITEMS


# -- vectors and sizes -----------------------------------------------------------------------------------------------
def broken(rows: np.ndarray, items: list[int], value: float) -> np.ndarray:
    rows[items] = value
    return rows


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: broken(rows, [3, 9], np.nan), "2 rows are not finite (items 3, 9)"),
        (lambda rows: broken(rows, [11], np.inf), "1 rows are not finite (items 11)"),
        (lambda rows: broken(rows, list(range(8)), 0), "8 rows are all zero (items 0, 1, 2, 3, 4 ...)"),
        (lambda rows: rows[1:], "has 39 rows and the catalog 40 items"),
    ],
    ids=["nan", "infinite", "zero", "short"],
)
def test_vectors_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[np.ndarray], np.ndarray], named: str
) -> None:
    np.save(tmp_path / "vectors.npy", change(np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float32)))
    given = ["semantic_ids.text.encoder=file", f"semantic_ids.text.source={tmp_path / 'vectors.npy'}"]
    words = ["tokenize", *SMALL, *given, f"data.root={shop(tmp_path / 'data')}", f"run_dir={tmp_path / 'run'}"]
    assert named in refused(capsys, *words)
    assert not list((tmp_path / "run").glob("semantic_ids*"))


@pytest.mark.parametrize("method", ["rqkmeans", "constrained", "rqkmeans_plus", "rqvae", "random"])
def test_fewer_items_than_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    size = ["semantic_ids.codes=41"] if method != "random" else ["semantic_ids.codes=6", "semantic_ids.levels=2"]
    words = ["tokenize", *SMALL, f"data.root={shop(tmp_path / 'data')}", f"run_dir={tmp_path / 'run'}"]
    named = "40 items cannot fill semantic_ids.codes=41" if method != "random" else "40 items, but semantic_ids.codes=6"
    assert named in refused(capsys, *words, f"semantic_ids.method={method}", *size)
    if method != "random":  # refused before any text was embedded
        assert not list((tmp_path / "run").glob("semantic_ids*"))


# -- an index of another catalog -----------------------------------------------------------------------------------
#: What is done to a good index, what tokenize says about it, and train where it says something else.
WRONG = [
    (lambda index: (index.pop("3"), index.pop("17")), "2 have no codes: '3', '17'", ""),
    (lambda index: index.update({"40": index["1"]}), "1 are not in the catalog: '40'", ""),
    (lambda index: index.update({"5": ["<a_1>"]}), "another number of codes than 3, or one more or less: '5'", ""),
    (lambda index: index.update({"5": ["<a_1>", "<b_1>"], "6": index["6"] + ["<d_0>"]}),
     "another number of tokens than 2 or 3: 6", "fine"),
    (lambda index: index.update({"5": ["<a_1>", "<x_1>", "<c_1>"]}), "not <a_N>, <b_N>, ... in this order: 5", "fine"),
    (lambda index: index.update({"6": ["bolt", "", "nut"]}), "not a list of words: '6'", ""),
]  # fmt: skip
IDS = ["missing", "extra", "depth", "depths", "token", "empty"]


def index_file(path: Path, change: Callable[[Index], object]) -> Path:
    index = {str(item): [f"<a_{item % 4}>", f"<b_{item // 4 % 4}>", f"<c_{item // 16}>"] for item in range(ITEMS)}
    change(index)
    path.write_text(json.dumps(index), encoding="utf-8")
    return path


@pytest.mark.parametrize(("change", "named"), [(change, named) for change, named, _ in WRONG], ids=IDS)
def test_tokenize_refuses_an_index_of_another_catalog(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Index], object], named: str
) -> None:
    given = f"semantic_ids.given={index_file(tmp_path / 'given.json', change)}"
    words = ["tokenize", *SMALL, given, f"data.root={shop(tmp_path / 'data')}", f"run_dir={tmp_path / 'run'}"]
    assert named in refused(capsys, *words)


@pytest.mark.parametrize(("change", "named"), [(c, named) for c, named, fine in WRONG if not fine])
def test_train_refuses_an_index_of_another_catalog(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Index], object], named: str
) -> None:
    """Any word is a code for train, which gives it a token."""
    given = f"catalog.index={index_file(tmp_path / 'given.json', change)}"
    words = ["train", "--dry-run", "data.dataset=inter", "catalog.kind=sid", given, "model.backbone=nano"]
    assert named in refused(capsys, *words, f"data.root={shop(tmp_path / 'data')}", f"run_dir={tmp_path / 'run'}")
