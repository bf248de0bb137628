"""What lies in a folder of raw or ready-made data, and which of its files count."""

from __future__ import annotations

from pathlib import Path

from tawin_nemo.config.schema import PrepareConfig
from tawin_nemo.data.interactions import MANIFEST
from tawin_nemo.data_prep import candidates_layout, contract, inter_layout, split_csv, table
from tawin_nemo.util.errors import DataError

SOURCES = ("synthetic", "amazon", "yelp", "inter", "candidates", "table", "split_csv", "parquet")


def detect(root: Path, prepare: PrepareConfig | None = None) -> str:
    """The format of the data in ``root``: one of SOURCES without synthetic, or prepared.

    Raises DataError if it is none of these, naming the expected files, and if a file is recognised and unusable.
    """
    if not root.is_dir():
        raise DataError(f"data.root={str(root)!r} is not a folder; give the folder that holds the data")
    if (root / MANIFEST).is_file():
        return "prepared"
    if any(root.glob("*.train.inter")):
        return "inter"
    if candidates_layout.found_in(root):
        return "candidates"
    metadata = _json_files(root, "meta_*")
    if metadata and len(_json_files(root, "*")) > len(metadata):
        return "amazon"
    if _json_files(root, "*review*") and _json_files(root, "*business*"):
        return "yelp"
    if split_csv.found_in(root):
        return "split_csv"
    if contract.found_in(root):
        return "parquet"
    if table.finds_log(root, prepare or PrepareConfig()):
        return "table"
    raise DataError(
        f"nothing known in {root}: looked for {MANIFEST} (prepared), NAME.train.inter (inter), NAME-val.json beside "
        "NAME-test.json (candidates), meta_NAME.json[.gz] "
        "beside NAME.json[.gz] (amazon), *review*.json[.gz] beside *business*.json[.gz] (yelp), a CSV file with "
        "history_item_id for each split (split_csv), interactions/*.parquet (parquet), and a table with user, item and "
        "time in CSV, TSV, JSON lines, Parquet or a folder of datasets (table); set data.dataset, prepare.reviews, "
        "prepare.metadata and prepare.columns for other names" + table.seen(root)
    )


def _json_files(root: Path, stem: str) -> list[Path]:
    """JSON files by name; releases differ in their ending."""
    return sorted({path for ending in ("json", "jsonl") for path in root.glob(f"{stem}.{ending}*") if _is_json(path)})


def _is_json(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".json", ".jsonl"))


def source_files(source: str, root: Path, prepare: PrepareConfig) -> list[Path]:
    """The files that the result depends on; reviews and metadata are the first two of raw layouts.

    Raises DataError where they are missing or several files could be meant.
    """
    if source == "synthetic":
        return []
    if source == "inter":
        return inter_layout.source_files(root)
    if source == "candidates":
        return candidates_layout.source_files(root)
    if source == "split_csv":
        return split_csv.find(root, prepare)
    if source == "parquet":
        return contract.source_files(root)
    if source == "table":
        return table.find(root, prepare).files
    items = _json_files(root, "meta_*" if source == "amazon" else "*business*")
    if source == "amazon":
        reviews = [path for path in _json_files(root, "*") if path not in items]
    else:
        reviews = _json_files(root, "*review*")
    return [
        _one_file(root, "prepare.reviews", prepare.reviews, reviews),
        _one_file(root, "prepare.metadata", prepare.metadata, items),
    ]


def _one_file(root: Path, key: str, named: str, paths: list[Path]) -> Path:
    if named:
        path = root / named
        if not path.is_file():
            raise DataError(f"{key}={named!r}: there is no file {path}")
        return path
    if len(paths) != 1:
        candidates = ", ".join(path.name for path in paths) or "none"
        raise DataError(f"set {key} to one file in {root}; candidates: {candidates}")
    return paths[0]


def default_name(source: str, root: Path, files: list[Path]) -> str:
    """The name of the data set as its ``files`` say."""
    if source == "inter":
        return inter_layout.find_name(root)
    if source == "candidates":
        return files[-1].name.removesuffix("-test.json")
    if source == "amazon":
        return files[0].name.split(".", 1)[0]
    if source == "split_csv":
        return files[0].stem if files[0].stem != "train" else root.resolve().name
    if source == "parquet":
        return root.resolve().name
    return {"yelp": "Yelp", "synthetic": "Synthetic"}.get(source) or _table_name(root, files)


def _table_name(root: Path, files: list[Path]) -> str:
    """The log's name; the folder's where the file has the usual name of a log, or is a part of a folder."""
    stem = files[0].name.split(".", 1)[0]
    usual = stem in ("ratings", "u", "log", "data", "interactions", "train", "dataset_dict") or files[0].parent != root
    return root.resolve().name if usual else stem
