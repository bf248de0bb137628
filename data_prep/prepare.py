"""Prepare a data set: ``python -m tawin_nemo.data_prep.prepare --help``, or ``prepare()`` from other programs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, asdict, replace
from dataclasses import Field as DataclassField
from pathlib import Path
from typing import Any

from tawin_nemo.config.fields import leaf_fields
from tawin_nemo.config.schema import ColumnsConfig, DataConfig, PrepareConfig, Recipe
from tawin_nemo.data.interactions import MANIFEST, read_manifest, verify_files
from tawin_nemo.data_prep import (
    amazon,
    candidates_layout,
    contract,
    inter_layout,
    own_reader,
    split_csv,
    synthetic,
    table,
    yelp,
)
from tawin_nemo.data_prep.dataset import READY_MADE, STATISTICS, Prepared, write_dataset
from tawin_nemo.data_prep.log_store import open_store
from tawin_nemo.data_prep.out_of_core import write_from_store
from tawin_nemo.data_prep.pipeline import build
from tawin_nemo.data_prep.raw import Collect, Period, RawData, Selection, collect_reviews, period
from tawin_nemo.data_prep.sources import SOURCES, default_name, detect, source_files
from tawin_nemo.util.errors import ConfigError, DataError, UserError
from tawin_nemo.util.files import sha256
from tawin_nemo.util.imports import is_import_path, source_hash
from tawin_nemo.util.log import say


def prepare(
    source: str, root: Path, out: Path, *, prepare: PrepareConfig, data: DataConfig, seed: int, name: str = "",
    used_by: Path | None = None,
) -> Path:  # fmt: skip
    """Prepare the raw or ready-made data in ``root`` as the folder ``out`` and return it.

    ``source`` is one of SOURCES, ``auto`` (see ``detect``) or ``prepared`` (returns ``root``). A finished folder with
    the same parameters and sources is reused. ``name`` (empty = taken from the files) goes into the manifest.
    ``seed`` matters for ``synthetic`` and ``prepare.ties=random`` only. Raises DataError or ConfigError, also when
    ``out`` holds other data and ``used_by`` names a checkpoint that was trained on them.
    """
    if source == "auto":
        source = detect(root, prepare)
        say(f"{root} holds data of the kind: {source}")
    if source == "prepared":
        read_manifest(root)
        return root
    if source not in SOURCES and not is_import_path(source):
        raise DataError(f"data.dataset={source!r} is unknown; use auto, prepared or one of {', '.join(SOURCES)}")
    own = is_import_path(source)
    files = own_reader.source_files(root) if own else source_files(source, root, prepare)
    name = name or (root.name if own else default_name(source, root, files))
    request = _request(source, files, prepare, data, seed, name)
    if _is_finished(out, request):
        say(f"{out} is already prepared from the same sources with the same parameters; reused")
        return out
    if used_by is not None and (out / MANIFEST).is_file():
        _check_unchanged(read_manifest(out).get("request"), request, out, used_by)
    if source in READY_MADE:
        write_dataset(_read_ready_made(source, root, files, prepare, data, name), out, request)
    elif prepare.engine == "duckdb":
        with open_store(out, prepare.memory_limit_gb) as store:
            raw = _read_raw(source, root, files, prepare, seed, name, store.collect)
            write_from_store(raw, store, out, request, prepare, max_history=data.max_history, seed=seed)
    else:
        raw = _read_raw(source, root, files, prepare, seed, name, collect_reviews)
        write_dataset(build(raw, prepare, max_history=data.max_history, seed=seed), out, request)
    say(f"prepared {name} in {out}; see {STATISTICS} there")
    return out


def _check_unchanged(before: Any, request: dict[str, Any], out: Path, used_by: Path) -> None:
    """Raises ConfigError when ``out`` was prepared by another request than this one."""
    if before == request:
        return  # files were lost or damaged; the same request writes the same bytes
    old, new = (dict(part.get("parameters", {})) for part in (before or {}, request))
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    raise ConfigError(
        f"{out} holds the data that {used_by} was trained on, and this recipe prepares others "
        f"({'; '.join(changed) or 'the source files differ'}): choose another name= or run_dir=, or remove that run"
    )


def _request(
    source: str, files: list[Path], prepare: PrepareConfig, data: DataConfig, seed: int, name: str
) -> dict[str, Any]:
    """Everything that the bytes of the result depend on."""
    parameters: dict[str, Any] = {"source": source, "name": name, "max_history": data.max_history}
    settings = asdict(prepare)
    if source not in READY_MADE:
        parameters |= {key: settings[key] for key in ("start", "end", "k_core", "max_title_words")}
    parameters |= _set_keys(prepare)
    published = _published_name(source, files, prepare.preset)
    if period(published) != period(name):
        parameters["period_of"] = published
    if source == "synthetic":
        parameters |= {key: value for key, value in settings.items() if key.startswith("synthetic_")} | {"seed": seed}
    if prepare.ties == "random":
        parameters["seed"] = seed
    if is_import_path(source):
        parameters["code"] = source_hash("data.dataset", source)
    sources = [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in files]
    return {"parameters": parameters, "sources": sources}


def _set_keys(prepare: PrepareConfig) -> dict[str, Any]:
    """Keys that came later and are not at their default: data prepared before a key existed are still the same."""
    later = ("columns", "events", "min_rating", "max_title_chars", "reserved_tokens", "decode_entities", "ties")
    now, default = asdict(prepare), asdict(PrepareConfig())
    keys = (*later, "split", "valid_start", "test_start")
    return {key: now[key] for key in keys if now[key] != default[key]}


def _published_name(source: str, files: list[Path], preset: str) -> str:
    """The data set whose published time window counts: ``prepare.preset``, or what the review file is called.

    The name of a run never decides: it seldom says which raw files it reads.
    """
    if preset != "auto":
        return "" if preset == "none" else preset
    if source == "amazon" and amazon.release(*files[:2]) is not amazon.RELEASE_2018:
        return ""  # the windows are those of the release of 2018
    return default_name(source, Path(), files) if source in ("amazon", "yelp") else ""


def _is_finished(out: Path, request: dict[str, Any]) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(out)
        if manifest.get("request") != request:
            return False
        verify_files(out, manifest)
    except DataError as error:
        say(f"preparing again: {error}")
        return False
    return True


def _read_ready_made(
    source: str, root: Path, files: list[Path], prepare: PrepareConfig, data: DataConfig, name: str
) -> Prepared:  # fmt: skip
    if source == "inter":
        return inter_layout.read(root, name, data.max_history, prepare)
    if source == "candidates":
        return candidates_layout.read(root, name, data.max_history, prepare)
    return split_csv.read(name, files, prepare, data.max_history)


def _read_raw(
    source: str, root: Path, files: list[Path], prepare: PrepareConfig, seed: int, name: str, collect: Collect
) -> RawData:
    published = _published_name(source, files, prepare.preset)
    window = period(published, prepare.start, prepare.end)
    if period(published) != period("") and not (prepare.start and prepare.end):
        say(f"time window {window}: the published one of {published} (prepare.preset=none takes all reviews)")
    if source == "synthetic":
        return _read_synthetic(prepare, window, seed, name, collect)
    if is_import_path(source):
        return own_reader.read(source, name, root, prepare, window, collect)
    if source == "table":
        return table.read(name, table.find(root, prepare), prepare, window, collect)
    if source == "parquet":
        return contract.read(name, root, prepare, window, collect)
    if prepare.events:
        raise ConfigError(f"prepare.events={','.join(prepare.events)}, but reviews ({source}) have no events; empty it")
    selection = Selection(min_rating=prepare.min_rating)
    reviews, metadata = files
    if source == "yelp":
        return yelp.read(name, reviews, metadata, window, selection, collect)
    return amazon.read(name, reviews, metadata, window, prepare.k_core, selection, collect)


def _read_synthetic(prepare: PrepareConfig, window: Period, seed: int, name: str, collect: Collect) -> RawData:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = (prepare.synthetic_items, prepare.synthetic_users, prepare.synthetic_reviews_per_user)
        say(synthetic.announcement(*size))
        synthetic.write_raw(folder, *size, seed)
        reviews, items = folder / synthetic.REVIEWS_FILE, folder / synthetic.METADATA_FILE
        selection = Selection(min_rating=prepare.min_rating)
        raw = amazon.read(name, reviews, items, window, prepare.k_core, selection, collect)
        return replace(raw, source="synthetic")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns exit code 0, or 2 on a UserError, whose message goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m tawin_nemo.data_prep.prepare", description="Prepare a data set.")
    parser.add_argument("--source", default="auto", choices=("auto", *SOURCES), help="what lies in --root")
    parser.add_argument("--root", type=Path, default=Path("."), help="folder with the raw files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", default="", help="name of the data set (empty = from the files)")
    parser.add_argument("--seed", type=int, default=42, help="of the synthetic log")
    options = [(key, option) for key, option in leaf_fields(Recipe) if _is_option(key)]
    for flag, option in options:
        parser.add_argument(
            f"--{flag}", type=_PARSERS[str(option.type)], default=_default(option), help=_help(option),
            choices=option.metadata.get("choices"),
        )  # fmt: skip
    given = vars(parser.parse_args(arguments))
    try:
        for flag, option in options:
            _check_limits(flag, given[flag], option)
        columns = {flag.split(".")[2]: given[flag] for flag, _ in options if flag.startswith("prepare.columns.")}
        own = {flag[8:]: given[flag] for flag, _ in options if flag.startswith("prepare.") and flag.count(".") == 1}
        prepare(
            given["source"],
            given["root"],
            given["out"],
            prepare=PrepareConfig(columns=ColumnsConfig(**columns), **own),
            data=DataConfig(max_history=given["data.max_history"]),
            seed=given["seed"],
            name=given["name"],
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(given["out"])
    return 0


#: How the command line reads a value of each type.
_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": float, "bool": lambda text: text.lower() in ("true", "yes", "1"),
    "list[str]": lambda text: [part.strip() for part in text.split(",") if part.strip()],
}  # fmt: skip


def _is_option(key: str) -> bool:
    return key.startswith("prepare.") or key == "data.max_history"


def _default(option: DataclassField[Any]) -> Any:
    return option.default if option.default is not MISSING else []


def _help(option: DataclassField[Any]) -> str:
    return f"{option.metadata['help']} (default: {_default(option)!r})".replace("%", "%%")


def _check_limits(flag: str, value: Any, option: DataclassField[Any]) -> None:
    low, high = option.metadata.get("low"), option.metadata.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"between {low} and {high}"
        raise DataError(f"--{flag} {value} is out of range; it must be {limits}")


if __name__ == "__main__":
    sys.exit(main())
